"""Attribution of the mismatch between trainer and engine to kernels, precisions, weight sync and staleness."""

import megatron_rl.policy  # noqa: F401  it must be imported before megatron.core
