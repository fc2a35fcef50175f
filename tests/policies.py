"""Policies and models for tests, with the plan that belongs to their configuration."""

from typing import Any

from megatron_rl.alp.layer_noise import LayerNoise, layer_noise
from megatron_rl.config import Config, PrecisionConfig
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.build import build_policy
from megatron_rl.policy.model import PolicyModel, build_chunks
from megatron_rl.policy.parallel import Mesh
from megatron_rl.precision.plan import PrecisionPlan, resolve
from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder


def embedded_plan(precision: PrecisionConfig, num_layers: int) -> PrecisionPlan:
    """Return the precision plan of a run with embedded engines."""
    return resolve(precision, num_layers, engine="embedded", device="cpu")


def planned(config: Config, shape: ModelShape) -> tuple[PrecisionPlan, LayerNoise | None]:
    """Return precision and noise of a configuration, without the checks of `resolve_run`."""
    return embedded_plan(config.precision, shape.num_layers), layer_noise(config.alp, shape.num_layers)


def build_planned_policy(config: Config, mesh: Mesh) -> Policy:
    """Return the policy of a configuration. Collective."""
    folder = HFFolder(config.model.path)
    parallel = config.parallel
    sizes = {"tensor_parallel": parallel.tensor, "expert_parallel": parallel.expert}
    shape = check_folder(folder, **sizes).shape
    return build_policy(config, mesh, *planned(config, shape))


def build_planned_chunks(config: Config, shape: ModelShape, mesh: Mesh) -> list[Any]:
    """Return the model chunks of a configuration, parameters unset. Collective."""
    chunks: list[PolicyModel] = build_chunks(config, shape, mesh, *planned(config, shape))
    return chunks
