"""The supported model families. A new family needs one more file and one more entry here."""

from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.deepseek_v3 import DEEPSEEK_V3
from megatron_rl.weights.families.family import Family, Rule
from megatron_rl.weights.families.glm4 import GLM4
from megatron_rl.weights.families.glm4_moe import GLM4_MOE
from megatron_rl.weights.families.glm4_moe_lite import GLM4_MOE_LITE
from megatron_rl.weights.families.gpt_oss import GPT_OSS
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.llama import LLAMA
from megatron_rl.weights.families.mistral import MISTRAL
from megatron_rl.weights.families.mixtral import MIXTRAL
from megatron_rl.weights.families.qwen2 import QWEN2
from megatron_rl.weights.families.qwen3 import QWEN3
from megatron_rl.weights.families.qwen3_moe import QWEN3_MOE
from megatron_rl.weights.families.rope import RopePlan, Yarn
from megatron_rl.weights.families.shape import Experts, Latent, ModelShape
from megatron_rl.weights.families.unsupported import reason

__all__ = [
    "FAMILIES",
    "Experts",
    "Family",
    "HFConfig",
    "Latent",
    "ModelShape",
    "RopePlan",
    "Rule",
    "Yarn",
    "family_of",
    "read_family",
]

FAMILIES: tuple[Family, ...] = (
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    DEEPSEEK_V3,
    GPT_OSS,
)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json.

    `where` names the file in the error message. Raise ConfigError if no family covers the architecture.
    """
    known = {architecture: family for family in FAMILIES for architecture in family.architectures}
    named = config.get("architectures")
    if named is None and config.get("model_type") in {family.model_type for family in FAMILIES}:
        return next(family for family in FAMILIES if family.model_type == config["model_type"])
    if not isinstance(named, list) or len(named) != 1:
        raise ConfigError(
            f"{where}: 'architectures' is {named!r}, exactly one name is needed; supported: {', '.join(sorted(known))}"
        )
    if named[0] not in known:
        why = reason(str(named[0]))
        raise ConfigError(
            f"{where}: architecture '{named[0]}' is not supported{'' if why is None else f', because {why}'}; "
            f"supported: {', '.join(sorted(known))}"
        )
    return known[named[0]]


def read_family(config: Mapping[str, Any], where: str) -> tuple[Family, ModelShape]:
    """Return the family and the shape of a config.json.

    Args:
        config: the JSON object.
        where: path of the file, for error messages.

    Raises:
        ConfigError: names the key, if the model is not supported.
    """
    family = family_of(config, where)
    values = HFConfig(config, where, family.defaults)
    shape = family.shape_from_config(values)
    values.finish()
    return family, shape
