"""Settings of the property tests."""

from hypothesis import HealthCheck, settings

# A limit in wall-clock time per example fails on a busy machine, whatever the code does.
# Some seeds draw dozens of inputs outside the domain of a formula before one inside.
settings.register_profile("megatron_rl", deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
settings.load_profile("megatron_rl")
