"""megatron_rl: reinforcement learning of language models on megatron-core and SGLang."""

__version__ = "0.1.0"
