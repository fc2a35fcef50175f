"""Settings of the property tests."""

from hypothesis import settings

# A limit in wall-clock time per example fails on a busy machine, whatever the code does.
settings.register_profile("megatron_rl", deadline=None)
settings.load_profile("megatron_rl")
