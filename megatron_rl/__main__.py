"""`python -m megatron_rl` is `megatron-rl`."""

from megatron_rl.cli import main

main()
