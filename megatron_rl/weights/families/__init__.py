"""The supported model families. A new family needs one more file and one more entry here."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.family import Experts, Family, HFConfig, ModelShape, Rule
from megatron_rl.weights.families.qwen3 import QWEN3
from megatron_rl.weights.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Experts", "Family", "HFConfig", "ModelShape", "Rule", "family_of"]

FAMILIES: tuple[Family, ...] = (QWEN3, QWEN3_MOE)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json.

    `where` names the file in the error message. Raise ConfigError if no family covers the architecture.
    """
    known = {architecture: family for family in FAMILIES for architecture in family.architectures}
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise ConfigError(
            f"{where}: 'architectures' is {named!r}, exactly one name is needed; supported: {', '.join(sorted(known))}"
        )
    if named[0] not in known:
        raise ConfigError(f"{where}: architecture '{named[0]}' is not supported; supported: {', '.join(sorted(known))}")
    return known[named[0]]
