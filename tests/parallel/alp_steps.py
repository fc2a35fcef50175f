"""What the ranks of a group run to show that perturbed layers are the same under every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from megatron_rl.objectives import make_objective
from megatron_rl.perturbation.layer import PerturbedLayer
from megatron_rl.perturbation.names import is_sigma
from megatron_rl.perturbation.noise import noise_key, normals
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints, TrainState
from megatron_rl.policy.normalisation import global_norm
from tests.parallel.checkpoint_steps import update
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


def gradient_by_differences(model: Path, layout: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """`layer n` -> d loss / d log_sigma as backward gives it, and as four losses around it do, those in float64."""
    policy = alp_policy(model, layout)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    grads: dict[str, np.ndarray] = {}
    policy.optimizer.step = lambda _: grads.update(sigmas(policy, lambda p: p.main_grad))  # type: ignore[method-assign]
    policy.update(batch, objective, objective.norm)
    for chunk in policy.models:
        chunk.double()
    whole = global_norm(objective.norm, batch, 92)

    def loss() -> float:
        with torch.no_grad():
            results = policy._run(
                batch, lambda micro, scores: policy._loss(micro, scores, objective, whole), forward_only=True, draw=0
            )
        return sum(float(report["loss"]) for report in results)

    answer = {}
    for layer in policy.models[0].decoder.layers:
        value, found = layer.log_sigma.data.clone(), 0.0
        for factor, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            layer.log_sigma.data = value + factor * 0.05
            found += weight * loss() / (12 * 0.05)
        layer.log_sigma.data = value
        answer[f"layer {layer.layer_index}"] = (float(grads.get(f"layer {layer.layer_index}", np.zeros(1))[0]), found)
    return answer


def scores_and_export(model: Path, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Log-probabilities, reference ones, names of the export and of a saved folder, of a policy whose sigma is huge."""
    policy = alp_policy(model, layout, alp={"sigma_init": 10.0})
    policy.keep_reference()
    clean, reference = policy.logprobs(make_batch()), policy.reference_logprobs(make_batch())
    names = [name for name, _ in policy.export()]
    policy.save_hf(folder)
    objective = make_objective(OBJECTIVE)
    stats = policy.update(make_batch(), objective, objective.norm)
    return {"logp": clean, "logref": reference, "names": names, "perturbed": stats.logp}


def updates(model: Path, layout: dict[str, Any], count: int = 1, **sections: Any) -> dict[str, Any]:
    """`count` updates: the last one's stats, weights, sigmas, the dtype and the group of every log_sigma."""
    policy = alp_policy(model, layout, **sections)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    stats = [policy.update(batch, objective, objective.norm) for _ in range(count)]
    own = [(name, p) for chunk in policy.models for name, p in chunk.named_parameters() if is_sigma(name)]
    return {
        "logp": [one.logp for one in stats],
        "metrics": stats[-1].metrics,
        "grad_norm": stats[-1].grad_norm,
        "loss": stats[-1].loss,
        "weights": exported(policy),
        "sigmas": sigmas(policy),
        "dtypes": {(p.dtype, p.main_grad.dtype) for _, p in own},
        "dtype": policy.models[0].decoder.layers[0].mlp.linear_fc1.weight.dtype,
        "parameters": sorted(name for name, _ in own),
        "kept": sorted(name for chunk in policy.models for name in chunk.state_dict() if is_sigma(name)),
    }


def save_and_go_on(model: Path, layout: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """Two updates, a checkpoint, a third update."""
    policy = alp_policy(model, layout, **sections)
    for _ in range(2):
        update(policy)
    saved = exported(policy) | sigmas(policy)
    checkpoints = Checkpoints(folder, policy, keep=2)
    checkpoints.save(TrainState(step=2, updates=policy.optimizer.updates), wait=True)
    checkpoints.close()
    update(policy)
    return {"saved": saved, "next": exported(policy) | sigmas(policy)}


def load_and_go_on(model: Path, layout: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """That checkpoint into a fresh policy that starts from another sigma, and the next update."""
    policy = alp_policy(model, layout, **sections)
    checkpoints = Checkpoints(folder, policy, keep=2)
    checkpoints.load_newest()
    loaded = exported(policy) | sigmas(policy)
    update(policy)
    checkpoints.close()
    return {"saved": loaded, "next": exported(policy) | sigmas(policy)}
