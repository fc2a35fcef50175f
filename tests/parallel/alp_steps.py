"""What the ranks of a group run to show that perturbed layers are the same under every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from megatron_rl.objectives import make_objective
from megatron_rl.perturbation.layer import PerturbedLayer
from megatron_rl.perturbation.noise import noise_key, normals
from megatron_rl.policy.actor import Policy
from tests.parallel.steps import OBJECTIVE, exported, make_batch, make_policy, replicas_differ

ALP = {"enabled": True, "sigma_init": 0.3, "lr": 0.05, "weight_decay": 0.01}
SEED = 77


def alp_policy(model: Path, layout: dict[str, Any], **sections: Any) -> Policy:
    return make_policy(model, layout, run={"seed": SEED}, alp={**ALP, **sections.pop("alp", {})}, **sections)


def sigmas(policy: Policy, pick: Any = lambda p: p.data) -> dict[str, np.ndarray]:
    """`layer n` -> what `pick` answers for its log_sigma, of all stages, on rank 0. Ranks that hold the same layer agree."""
    own = {
        f"layer {layer.layer_index}": pick(layer.log_sigma).detach().float().numpy().copy()
        for chunk in policy.models
        for layer in chunk.decoder.layers
        if layer.log_sigma is not None
    }
    merged: dict[str, np.ndarray] = {}
    for part in policy.mesh.gather(own):
        for name, value in part.items():
            assert np.array_equal(merged.setdefault(name, value), value), f"{name} differs between ranks"
    return merged


def note_noise(policy: Policy) -> tuple[dict[tuple[int, int, int], bytes], list[RemovableHandle]]:
    """Fills (layer, trajectory, position) -> noise, in bits, as the layers of this rank are given it."""
    seen: dict[tuple[int, int, int], bytes] = {}

    def note(layer: PerturbedLayer, args: Any, kwargs: dict[str, Any]) -> None:
        draw = kwargs["packed_seq_params"].noise
        if draw is None:
            return
        eps = normals(draw.rows, noise_key(draw.seed, draw.step, layer.layer_index), layer.config.hidden_size)
        for token, position, row in zip(draw.rows.ids.tolist(), draw.rows.positions.tolist(), eps.numpy(), strict=True):
            if token >= 0:
                key = (layer.layer_index, token, position)
                assert seen.setdefault(key, row.tobytes()) == row.tobytes(), f"{key} has two values"

    layers = [layer for chunk in policy.models for layer in chunk.decoder.layers]
    return seen, [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]


def step(model: Path, layout: dict[str, Any], sabotage: str | None = None, **sections: Any) -> dict[str, Any]:
    """As `steps.step`, with perturbation: the scales are among gradients and weights, and the noise is answered too."""
    policy = alp_policy(model, layout, **sections)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    grads: dict[str, np.ndarray] = {}
    optimizer_step = policy.optimizer.step

    def noting_step(grad_norm: float) -> None:
        grads.update(exported(policy, lambda p: p.main_grad) | sigmas(policy, lambda p: p.main_grad))
        optimizer_step(grad_norm)

    policy.optimizer.step = noting_step  # type: ignore[method-assign]
    if sabotage == "seed_of_rank":
        config = policy.config.model_copy(
            update={"run": policy.config.run.model_copy(update={"seed": SEED + policy.mesh.rank})}
        )
        policy.config = config
    noise, hooks = note_noise(policy)
    stats = policy.update(batch, objective, objective.norm)
    for hook in hooks:
        hook.remove()
    merged: dict[tuple[int, int, int], bytes] = {}
    conflicts = 0
    for part in policy.mesh.gather(noise):
        for key, value in part.items():
            conflicts += merged.setdefault(key, value) != value
    return {
        "grads": grads,
        "weights": exported(policy) | sigmas(policy),
        "noise": merged,
        "noise_conflicts": conflicts,
        "replicas_differ": replicas_differ(policy),
        **{name: value for name, value in dataclasses.asdict(stats).items() if name != "lr"},
    }
