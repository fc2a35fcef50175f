"""What SGLang computes otherwise than the model's authors, without a word, refused before a server starts."""

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.weights.families import Family, ModelShape
from megatron_rl.weights.families.rope import Dynamic


def check_engine(config: Config, family: Family, shape: ModelShape) -> None:
    """Raise ConfigError if SGLang 0.5.23 would sample from another model than the one that is trained.

    Its log-probabilities of toy models differ by 0.5 to 1.5 in these cases, and by 2e-6 in all others that it serves
    (docs/checkpoints.md). Its code has no other path on GPUs.

    Args:
        config: the configuration.
        family: family of the model.
        shape: shape of the model.
    """
    if config.rollout.engine != "sglang":
        return
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    window = min((width for width in shape.windows if width is not None), default=longest)
    experts = shape.experts
    ignored = {
        # gpt-oss is the family with sinks, and the one whose windows SGLang has.
        f"the window of {window} keys, though trajectories have {longest}": not shape.sinks and window < longest,
        "that some layers have no experts": family.model_type == "qwen3_moe" and experts and experts.dense_layers,
        "that dynamic RoPE changes nothing within max_position_embeddings": isinstance(shape.rope.scaling, Dynamic),
    }
    for what, there in ignored.items():
        if there:
            raise ConfigError(
                f"rollout.engine: sglang ignores {what} ({config.model.path}/config.json), and would sample from "
                "another model than the trained one: set rollout.engine: embedded"
            )
