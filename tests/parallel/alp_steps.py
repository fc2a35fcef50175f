"""Functions that the ranks of a group run to test that perturbed layers are equal under every layout.

The common arguments are described in `tests.parallel.steps`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from megatron_rl.alp.layer import NoiseDraw, PerturbedLayer
from megatron_rl.alp.logits import LogitNoise
from megatron_rl.alp.names import is_sigma
from megatron_rl.alp.noise import Key, NoiseRows, noise_key, normals
from megatron_rl.alp.sigma import SigmaModule, sigma_modules
from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.loss_denominator import global_norm
from tests.parallel.checkpoint_steps import update
from tests.parallel.steps import OBJECTIVE, exported, make_batch, make_policy, noted_update, replicas_differ

ALP = {"enabled": True, "sigma_init": 0.3, "lr": 0.05, "weight_decay": 0.01}
SEED = 77


def alp_policy(model: Path, layout: dict[str, Any], **sections: Any) -> Policy:
    return make_policy(model, layout, run={"seed": SEED}, alp={**ALP, **sections.pop("alp", {})}, **sections)


def place(holder: SigmaModule, policy: Policy) -> str:
    return "logits" if holder.layer_index == policy.shape.num_layers else f"layer {holder.layer_index}"


def sigmas(policy: Policy, pick: Any = lambda p: p.data) -> dict[str, np.ndarray]:
    """Return {`layer n` or `logits`: `pick` of its log_sigma} of all stages, on rank 0. Check that ranks agree."""
    own = {
        place(holder, policy): pick(holder.log_sigma).detach().float().numpy().copy()
        for chunk in policy.models
        for holder in sigma_modules(chunk)
    }
    merged: dict[str, np.ndarray] = {}
    for part in policy.mesh.gather(own):
        for name, value in part.items():
            assert np.array_equal(merged.setdefault(name, value), value), f"{name} differs between ranks"
    return merged


def named(policy: Policy, pick: Any = None) -> dict[str, np.ndarray]:
    """Return `exported` together with `sigmas`."""
    return exported(policy, pick) | (sigmas(policy, pick) if pick else sigmas(policy))


class NoiseNotes:
    """Recorder of the noise that this rank's layers or logits get.

    Attributes:
        seen: bytes of the noise by (layer, trajectory, position).
        vocab: size of the vocabulary.
        hooks: the hooks on the layers.
    """

    def __init__(self, policy: Policy) -> None:
        self.seen: dict[tuple[int, int, int], bytes] = {}
        self.vocab = policy.shape.vocab_size
        self.hooks: list[RemovableHandle] = []
        for chunk in policy.models:
            self.hooks += [
                layer.register_forward_pre_hook(self._layer, with_kwargs=True) for layer in chunk.decoder.layers
            ]
            if chunk.perturbation is not None:
                chunk.perturbation.noise = self._noting(chunk.perturbation.noise, chunk.perturbation.layer_index)

    def _layer(self, layer: PerturbedLayer, args: Any, kwargs: dict[str, Any]) -> None:
        draw = kwargs["packed_seq_params"].noise
        if draw is not None and layer.log_sigma is not None:
            key = noise_key(draw.seed, draw.step, layer.layer_index)
            self._note(layer.layer_index, draw.rows, key, layer.config.hidden_size)

    def _noting(self, make: Callable[..., LogitNoise], index: int) -> Callable[..., LogitNoise]:
        def noting(draw: NoiseDraw, scored_R: torch.Tensor) -> LogitNoise:
            noise = make(draw, scored_R)
            self._note(index, noise.rows, noise.key, self.vocab)
            return noise

        return noting

    def _note(self, index: int, rows: NoiseRows, key: Key, width: int) -> None:
        eps = normals(rows, key, width).numpy()
        for token, position, row in zip(rows.ids.tolist(), rows.positions.tolist(), eps, strict=True):
            if token >= 0:
                name = (index, token, position)
                assert self.seen.setdefault(name, row.tobytes()) == row.tobytes(), f"{name} has two values"

    def of_all_ranks(self, policy: Policy) -> tuple[dict[tuple[int, int, int], bytes], int]:
        """Return the noise of all ranks on rank 0, and how often ranks disagree."""
        merged: dict[tuple[int, int, int], bytes] = {}
        parts = policy.mesh.gather(self.seen)
        return merged, sum(merged.setdefault(name, row) != row for part in parts for name, row in part.items())


def step(model: Path, layout: dict[str, Any], sabotage: str | None = None, **sections: Any) -> dict[str, Any]:
    """Make the step of `steps.step` with perturbation. Gradients and weights include the sigmas.

    The noise is also returned. sabotage: `seed_of_rank` gives every rank another seed.
    """
    policy = alp_policy(model, layout, **sections)
    if sabotage == "seed_of_rank":
        policy.settings = replace(policy.settings, noise_seed=SEED + policy.mesh.rank)
    notes = NoiseNotes(policy)
    stats, grads = noted_update(policy, named)
    noise, conflicts = notes.of_all_ranks(policy)
    for hook in notes.hooks:
        hook.remove()
    return {
        "grads": grads,
        "weights": named(policy),
        "noise": noise,
        "noise_conflicts": conflicts,
        "replicas_differ": replicas_differ(policy),
        **{name: value for name, value in dataclasses.asdict(stats).items() if name != "lr"},
    }


def gradient_by_differences(model: Path, layout: dict[str, Any], **sections: Any) -> dict[str, tuple[float, float]]:
    """Return {`layer n` or `logits`: (d loss / d log_sigma from backward, the same from four losses around it)}.

    The four losses are computed in float64.
    """
    policy = alp_policy(model, layout, **sections)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    grads: dict[str, np.ndarray] = {}
    policy.optimizer.step = lambda _: grads.update(sigmas(policy, lambda p: p.main_grad))  # type: ignore[method-assign]
    policy.update(batch, objective, objective.norm)
    for chunk in policy.models:
        chunk.double()
    whole = global_norm(objective.norm, batch, 92)

    def loss() -> float:
        with torch.no_grad():
            one = partial(policy._loss, objective=objective, norm=whole, own_logold=False)
            results = policy._run(batch, one, forward_only=True, draw=0)
        return sum(float(report["loss"]) for report in results)

    answer = {}
    for holder in sigma_modules(policy.models[0]):
        value, found = holder.log_sigma.data.clone(), 0.0
        for factor, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            holder.log_sigma.data = value + factor * 0.05
            found += weight * loss() / (12 * 0.05)
        holder.log_sigma.data = value
        name = place(holder, policy)
        answer[name] = (float(grads.get(name, np.zeros(1))[0]), found)
    return answer


def scores_and_export(model: Path, layout: dict[str, Any], folder: Path, **alp: Any) -> dict[str, Any]:
    """Score, export, save and update a policy whose sigma is huge. Return log-probabilities and exported names."""
    policy = alp_policy(model, layout, alp={"sigma_init": 10.0, **alp})
    policy.keep_reference()
    clean, reference = policy.logprobs(make_batch()), policy.reference_logprobs(make_batch())
    names = [name for name, _ in policy.export()]
    policy.save_hf(folder)
    objective = make_objective(OBJECTIVE)
    stats = policy.update(make_batch(), objective, objective.norm)
    return {"logp": clean, "logref": reference, "names": names, "perturbed": stats.logp}


def updates(model: Path, layout: dict[str, Any], count: int = 1, **sections: Any) -> dict[str, Any]:
    """Make `count` updates.

    Return the log-probabilities of each, the last one's stats, the weights and sigmas, and the dtypes and names of
    every log_sigma.
    """
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
    """Make two updates, save a checkpoint, and make a third update."""
    policy = alp_policy(model, layout, **sections)
    for _ in range(2):
        update(policy)
    saved = named(policy)
    checkpoints = Checkpoints(folder, policy, keep=2)
    checkpoints.save(TrainState(step=2, updates=policy.optimizer.updates), wait=True)
    checkpoints.close()
    update(policy)
    return {"saved": saved, "next": named(policy)}


def load_and_go_on(model: Path, layout: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """Load that checkpoint into a new policy that starts from another sigma, and make the next update."""
    policy = alp_policy(model, layout, **sections)
    checkpoints = Checkpoints(folder, policy, keep=2)
    checkpoints.load_newest()
    loaded = named(policy)
    update(policy)
    checkpoints.close()
    return {"saved": loaded, "next": named(policy)}
