"""The temperature at which the policy scores tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rl.policy.actor import Policy


@contextmanager
def at_temperature_one(policy: Policy) -> Iterator[None]:
    """Score at temperature 1 inside the block, as engines score given tokens."""
    before = [model.temperature for model in policy.models]
    try:
        for model in policy.models:
            model.temperature = 1.0
        yield
    finally:
        for model, temperature in zip(policy.models, before, strict=True):
            model.temperature = temperature
