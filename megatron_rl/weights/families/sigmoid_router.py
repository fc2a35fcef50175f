"""What GLM-4.5 and DeepSeek-V3 have in common: a sigmoid router, shared experts, dense first layers, later MTP layers.

The layers for multi-token prediction (MTP) draft tokens for speculative decoding. They are not trained: a folder that
is written holds them as the source does, and an engine that drafts with them accepts fewer tokens after training.
"""

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.hf_config import HFConfig
from megatron_rl.weights.families.shape import Experts, ModelShape
from megatron_rl.weights.families.table_parts import check_choice


def sigmoid_experts(config: HFConfig, dense_layers: frozenset[int]) -> Experts:
    """Return the mixture of a config.json.

    Args:
        config: values of config.json.
        dense_layers: layers without experts.

    Raises:
        ConfigError: if megatron-core's router would choose other experts or other gates.
    """
    config.demand("norm_topk_prob", (True,))  # megatron-core always normalizes sigmoid gates
    config.demand("topk_method", ("noaux_tc", None))
    config.demand("scoring_func", ("sigmoid", None))
    config.demand("moe_layer_freq", (1, None))
    groups, chosen = config.integer("n_group"), config.integer("topk_group")
    experts = Experts(
        count=config.either("n_routed_experts", "num_local_experts", "num_experts"),
        per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        norm_topk_prob=True,
        dense_layers=dense_layers,
        score="sigmoid",
        correction_bias=True,
        groups=1 if groups == chosen else groups,
        groups_per_token=1 if groups == chosen else chosen,
        scaling=config.number("routed_scaling_factor"),
        shared_width=config.integer("moe_intermediate_size") * config.integer("n_shared_experts"),
    )
    _check_groups(experts, config.where)
    if len(dense_layers) == config.integer("num_hidden_layers"):
        raise ConfigError(f"{config.where}: no layer is left with experts: give the dense model's config.json")
    return check_choice(experts, config.where)


def _check_groups(experts: Experts, where: str) -> None:
    if experts.groups == 1:
        return
    if experts.count % experts.groups or experts.groups_per_token > experts.groups:
        raise ConfigError(
            f"{where}: 'n_group' = {experts.groups} and 'topk_group' = {experts.groups_per_token} do not divide and "
            f"choose among {experts.count} experts"
        )
    # Models score a group by its two best experts, megatron-core by its best num_experts_per_tok / topk_group.
    if experts.per_token != 2 * experts.groups_per_token:
        raise ConfigError(
            f"{where}: 'num_experts_per_tok' = {experts.per_token} and 'topk_group' = {experts.groups_per_token}: "
            "groups of experts are supported only if a token has two experts for each of its groups, because "
            "megatron-core would choose other groups"
        )


def first_layers_dense(config: HFConfig) -> frozenset[int]:
    """Return the layers below `first_k_dense_replace`."""
    return frozenset(range(min(config.integer("first_k_dense_replace", least=0), config.integer("num_hidden_layers"))))


def mtp_layers(config: HFConfig) -> int:
    """Return how many layers for multi-token prediction a folder may hold after its last layer."""
    keys = "num_nextn_predict_layers", "num_mtp_layers"
    return 0 if all(config.get(key) is None for key in keys) else config.either(*keys)


def mtp_names(shape: ModelShape) -> tuple[str, ...]:
    """Return how the names of the tensors for multi-token prediction begin."""
    return tuple(f"model.layers.{shape.num_layers + n}." for n in range(shape.mtp_layers))
