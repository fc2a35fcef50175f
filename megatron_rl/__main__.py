"""Entry point: `python -m megatron_rl` is the same as `megatron-rl`."""

from megatron_rl.cli import main

main()
