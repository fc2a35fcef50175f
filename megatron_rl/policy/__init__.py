"""The trained model on megatron-core: device port, process groups, model, log-probabilities, updates, checkpoints."""

import warnings

from megatron_rl.policy.device_port import stand_in_for_jit

# megatron-core warns at import about every optional CUDA package.
# `megatron-rl doctor` reports which ones are installed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron\.core|torch\.distributed\.checkpoint).*")
stand_in_for_jit()  # here, because it must run before the first import of megatron.core
