"""Attribution of the mismatch: engine and trainer score a few new trajectories in every state between the two."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from megatron_rl.attribution.hidden import check_one_rank, hidden_errors, rounding_floor
from megatron_rl.attribution.limits import check_replayable
from megatron_rl.attribution.replay import engine_products, restore_weights_after, without_recipe
from megatron_rl.config import RolloutConfig
from megatron_rl.diagnostics.score_chain import (
    SOURCES,
    ScoreChain,
    TensorMismatch,
    compare_tensors,
    largest_source,
    layer_verdict,
    sync_verdict,
)
from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.errors import CheckpointError, EngineError, StorageError
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.temperature import at_temperature_one
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.sampling.batch import make_batch
from megatron_rl.sampling.group import sample_groups
from megatron_rl.types import Batch, Prompt
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import HFModel, check_folder
from megatron_rl.weights.load_weights import load_weights
from megatron_rl.weights.quantized import export_dtypes
from megatron_rl.weights.write_folder import write_hf_folder


@dataclass(frozen=True)
class AttributionProbe:
    """Trajectories that an engine sampled at temperature 1 under one weight version, and its scores of the whole texts.

    Attributes:
        url: URL of the engine.
        version: weight version that sampled.
        batch: the trajectories, with logmu.
        prefill: [N] float32, the engine's log-probabilities of the batch's trained tokens; 0 elsewhere.
    """

    url: str
    version: int
    batch: Batch
    prefill: np.ndarray


@dataclass(frozen=True)
class Attribution:
    """The result of an attribution.

    Attributes:
        version: weight version that the probe's engine served.
        chain: the scores from engine to trainer.
        faults: tensors of engines that differ from those that were sent.
        layers: relative error of each layer's outputs; None if they were not compared.
        floor: relative error that rounding leaves at every layer.
    """

    version: int
    chain: ScoreChain
    faults: list[TensorMismatch]
    layers: list[float] | None
    floor: float

    @property
    def verdict(self) -> list[str]:
        """The conclusions, one sentence each."""
        sentences = [largest_source(self.chain.record()), sync_verdict(self.faults)]
        return sentences if self.layers is None else [*sentences, layer_verdict(self.layers, self.floor)]

    def record(self, step: int, sampled_by: int) -> dict[str, Any]:
        """Return the record for the run log.

        `step` and `sampled_by` are the numbers of steps done by the trainer's weights and by the sampling weights.
        """
        record: dict[str, Any] = {
            "kind": "attribution",
            "step": step,
            "version": self.version,
            "sampled_by": sampled_by,
        }
        record |= self.chain.record()
        record["attribution/sync/tensors"] = len(self.faults)
        if self.layers is not None:
            record["attribution/layers"] = self.layers
        return record | {"attribution/verdict": "; ".join(self.verdict)}

    def table(self, sampled_by: int) -> Table:
        """Return the table of the sources, for printing. `sampled_by`: number of steps done by the sampling weights."""
        record = self.chain.record()
        tokens = f"{record['attribution/tokens']:.0f} tokens sampled by the weights of step {sampled_by}"
        table = Table(title=f"log ratio logp - logmu of {tokens}, in nats", min_width=72)
        table.add_column("source")
        for heading in ("mean |delta|", "q99", "max", "KL part", "share"):
            table.add_column(heading, justify="right")
        for name in (*SOURCES, "total"):
            at = f"attribution/{name}/"
            numbers = [f"{record[at + key]:.2e}" for key in ("mean_abs", "q99", "max", "kl")]
            table.add_row(name, *numbers, f"{record[at + 'share']:.1%}", end_section=name == "staleness")
        return table


def draw_probe(
    url: str,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    *,
    stop_token_ids: Sequence[int],
    seed: int,
    version: int,
    api_key: str | None = None,
) -> AttributionProbe:
    """Have one engine sample a response to each prompt and score it again. For rank 0.

    Args:
        url: URL of the engine.
        prompts: prompts, one response each.
        rollout: the `rollout` section.
        stop_token_ids: tokens that end a response.
        seed: seed of the samples.
        version: weight version that the engine must serve.
        api_key: key that the engine wants; None: it wants none.

    Raises:
        EngineError: the engine samples under another version, or cannot score what it sampled.
    """
    with EnginePool([url], rollout.timeout_s, api_key=api_key) as pool:
        sampled = sample_groups(
            pool,
            prompts,
            rollout,
            first_id=0,
            first_group=0,
            seed=seed,
            stop_token_ids=stop_token_ids,
            need_logmu=True,
            temperature=1.0,
            samples=1,
        )
        texts = [np.concatenate([t.prompt_tokens, t.response_tokens]) for t in sampled]
        nothing = SamplingParams(max_new_tokens=0)
        scored = pool.generate(
            [
                GenerationRequest(f"score-{seed}-{at}", text, 1, nothing, score_prompt=True)
                for at, text in enumerate(texts)
            ]
        )
    stale = {served for t in sampled for served in t.sampled_by} - {version}
    if stale:
        raise EngineError(f"{url} samples under weight version {min(stale)} instead of {version}: it was restarted")
    batch = make_batch([t.with_reward(0.0) for t in sampled], "mean")
    prefill = np.zeros(len(batch.tokens), dtype=np.float32)
    ends = [
        sample.prompt_logprobs[len(t.prompt_tokens) - 1 :]
        for t, (sample,) in zip(sampled, scored, strict=True)
        if sample.prompt_logprobs is not None
    ]
    prefill[batch.mask > 0] = np.concatenate(ends)
    if not np.isfinite(prefill).all():
        raise EngineError(
            f"{url} scores a text it sampled with numbers that are not finite: check the weights it serves"
        )
    return AttributionProbe(url, version, batch, prefill)


def attribute(
    policy: Policy,
    plan: PrecisionPlan,
    pool: EnginePool | None,
    probe: AttributionProbe,
    folder: Path,
    *,
    sampled: list[Tensor] | None = None,
    layers: bool = False,
) -> Attribution:
    """Score the probe's tokens in every state between engine and trainer. Collective; every rank gets the same result.

    The parameters are restored afterwards, also if an error is raised. States that are identical by construction (for
    example without an FP8 recipe) reuse the previous score.

    Args:
        policy: the trainer's policy.
        plan: the precision of trainer and engines.
        pool: the engines, on rank 0. The weights of all of them are compared; the probe's engine is the one replayed.
        probe: the trajectories to score.
        folder: folder for weights; must be readable by ranks and engines. Removed afterwards.
        sampled: `Policy.copy_weights` of the version that sampled; None: the present weights.
        layers: also compare hidden states; on one rank only.
    """
    check_replayable(plan)
    if layers:
        check_one_rank(policy.mesh.world)
    mesh, batch = policy.mesh, probe.batch
    trained = batch.mask > 0

    def score() -> np.ndarray:
        return np.asarray(mesh.broadcast(policy.logprobs(batch)))[trained].astype(np.float64)

    def score_served(weights: Path, quantized_inputs: bool = False) -> np.ndarray:
        with ExitStack() as products:
            opened = check_folder(products.enter_context(closing(HFFolder(weights))))
            _load(policy, opened)
            if plan.quantizes_inputs:
                products.enter_context(engine_products(policy, opened, plan, quantized_inputs=quantized_inputs))
            return score()

    with ExitStack() as stack:
        if mesh.rank == 0:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(at_temperature_one(policy))
        now = score()
        stack.enter_context(restore_weights_after(policy))
        if sampled is not None:
            policy.put_weights(sampled)
        fresh = now if sampled is None else score()
        sent, held = folder / "sent", folder / "held"
        _write_sent(policy, plan, sent)
        faults = mesh.on_lead(lambda: compare_engines(pool, probe.url, sent, held))
        faulty = any(fault.engine == probe.url for fault in faults)
        stack.enter_context(without_recipe(policy))
        plain = score() if plan.trains_low else fresh
        wanted = score_served(sent) if plan.rolls_out_low or plan.engine != plan.train else plain
        errors = hidden_errors(policy, batch, held) if layers else None
        served = score_served(held) if faulty else wanted
        emulated = score_served(held, quantized_inputs=True) if plan.quantizes_inputs else served
    assert batch.logmu is not None
    engine = (batch.logmu[trained], probe.prefill[trained])
    chain = ScoreChain.of((*engine, emulated, served, wanted, plain, fresh, now))
    return Attribution(probe.version, chain, faults, errors, rounding_floor(plan))


def served_weights(policy: Policy, plan: PrecisionPlan) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the weights an engine must hold for the policy's present weights: names, and values on rank 0. Collective.

    Other ranks get None as values. The weights are computed from the unquantized export and the plan, without the code
    that quantizes for the transfer, because that code is to be checked.
    """
    dtype = torch.float32 if plan.quantizes_inputs else DTYPES[plan.engine]
    dtypes = export_dtypes(plan, policy.source)
    for name, tensor in export_weights(
        policy.models, policy.family, policy.shape, dtypes=dtypes, control=policy.mesh.control
    ):
        coded = tensor is not None and plan.rolls_out_low and plan.quantized(name)
        yield name, fake_quantize(tensor, plan.wire, dtype).contiguous() if tensor is not None and coded else tensor


def compare_engines(pool: EnginePool | None, url: str, sent: Path, held: Path) -> list[TensorMismatch]:
    """Return the tensors of any live engine that differ from those in the folder `sent`. For rank 0.

    Args:
        pool: the engines.
        url: URL of the engine to be replayed.
        sent: model folder of the weights that engines must hold.
        held: path that receives the model folder of engine `url`.

    Raises:
        EngineError: an engine is lost or cannot return its weights.
    """
    assert pool is not None
    faults: list[TensorMismatch] = []
    with closing(HFFolder(sent)) as wanted:
        for engine in pool.live_urls:
            place = held if engine == url else held.with_name("other")
            pool.save_weights(engine, place)
            shutil.copyfile(sent / "config.json", place / "config.json")
            with closing(HFFolder(place)) as found:
                faults += _faults(engine, found, wanted)
            if engine != url:
                shutil.rmtree(place)
    return faults


def _faults(engine: str, found: HFFolder, wanted: HFFolder) -> list[TensorMismatch]:
    pairs = ((name, found.read(name) if name in found.tensors else None) for name in wanted.tensors)
    return [fault for name, tensor in pairs if (fault := compare_tensors(engine, name, tensor, wanted.read(name)))]


def _write_sent(policy: Policy, plan: PrecisionPlan, folder: Path) -> None:
    """Write `served_weights` as a model folder that every rank can load. Collective."""
    stream = served_weights(policy, plan)

    def write() -> None:
        try:
            write_hf_folder(folder, ((name, tensor) for name, tensor in stream if tensor is not None), policy.source)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written ({error}): free space there") from error

    failure: CheckpointError | None = None
    if policy.mesh.rank == 0:
        try:
            write()
        except CheckpointError as error:
            failure = error
    for _ in stream:  # the export is collective: every rank completes it, also after a failure
        pass
    policy.mesh.raise_everywhere(policy.mesh.broadcast(failure))


def _load(policy: Policy, weights: HFModel) -> None:
    load_weights(policy.models, weights, tp_rank=policy.mesh.tp_rank, tp_size=policy.mesh.tp_size)
