"""Attribution names the faults that a test places between a real policy and a real engine behind HTTP."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI

from megatron_rl.attribution.attribute import Attribution, attribute, draw_probe
from megatron_rl.config import Config, TaskConfig, make_config
from megatron_rl.diagnostics.evaluations import EvaluationLog
from megatron_rl.diagnostics.runlog import RunLog
from megatron_rl.diagnostics.samples import SampleLog
from megatron_rl.engines.offload import OffloadedEngines
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError
from megatron_rl.plan import resolve_run
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.device_port import pick_device
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.protocol.server_options import EngineQuantization
from megatron_rl.sampling.rollouts import Rollouts
from megatron_rl.server.access import Access
from megatron_rl.server.app import create_app
from megatron_rl.server.engine import Engine
from megatron_rl.tasks import make_task
from megatron_rl.trainer.attribution import attribute_step
from megatron_rl.trainer.lead import Lead
from megatron_rl.trainer.progress import ProgressLine
from megatron_rl.trainer.run_control import RunControl
from megatron_rl.trainer.stops import Stops
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.types import Prompt
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weights.quantized import quantization_config
from tests.disk_sync import disk_sync
from tests.models import make_qwen3
from tests.policies import build_planned_policy, embedded_plan
from tests.serving import serving
from tests.unit.tasks.char_tokenizer import char_tokenizer

FP32 = {"train": "fp32", "rollout": "fp32"}
BF16_ENGINE = {"train": "fp32", "rollout": "bf16"}
FP8_WEIGHTS = {"train": "bf16", "rollout": "fp8_blockwise"}
FP8_ENGINE = FP8_WEIGHTS | {"rollout_activations": "fp8"}
FP8_BOTH = FP8_ENGINE | {"recipe": "blockwise"}
DOWN = "model.layers.2.mlp.down_proj.weight"


@dataclass
class Pair:
    """A policy of one rank, an engine, and everything between them.

    Attributes:
        version: the weight version that the engine must sample under.
    """

    config: Config
    policy: Policy
    plan: PrecisionPlan
    engine: Engine
    pool: EnginePool
    sync: WeightSync
    folder: Path
    version: int = 1

    def attribute(self, **how: Any) -> Attribution:
        """Return the attribution of six sampled responses."""
        url = self.pool.live_urls[0]
        prompts = [Prompt(f"p{i}", "", tuple(range(2 + i, 8 + 2 * i)), "") for i in range(6)]
        rollout = self.config.rollout
        probe = draw_probe(url, prompts, rollout, stop_token_ids=(0,), seed=1, version=self.version)
        return attribute(self.policy, self.plan, self.pool, probe, self.folder / "attribution", **how)

    def move(self, scale: float, seed: int = 0) -> None:
        """Change the policy's weights as an update would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.models[0].parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("model"), tied=False, vocab=64)


@pytest.fixture
def paired(model: Path, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Return a function that makes a policy and an engine of the given precisions, with version 1 published.

    `dtype` is the engine's, if it differs from the plan's. The engine is deterministic. So two probes under the same
    weights have the same trajectories and scores.
    """
    with ExitStack() as stack:

        def make(precision: dict[str, Any], publish: bool = True, dtype: str = "") -> Pair:
            rollout = {"max_prompt_tokens": 32, "max_new_tokens": 24, "temperature": 0.7, "timeout_s": 60}
            optimizer = {"tokens_per_microbatch": 64}
            tree = {"model": {"path": str(model)}, "precision": precision, "rollout": rollout, "optimizer": optimizer}
            config: Config = make_config(tree | {"run": {"dir": str(tmp_path)}})
            mesh = parallel.initialize(config.parallel, pick_device("cpu"), seed=0)
            policy = build_planned_policy(config, mesh)
            plan = embedded_plan(config.precision, policy.shape.num_layers)
            engine_quantization = EngineQuantization.of(config.precision)
            if dtype and engine_quantization:
                plan = engine_quantization.plan(policy.shape.num_layers, dtype)
            engine = Engine(
                model, plan.engine, threads=1, deterministic=True, engine_quantization=engine_quantization
            ).start()
            pool = stack.enter_context(
                EnginePool([stack.enter_context(serving(create_app(engine, Access(save_dirs=(tmp_path,)))))], 60)
            )
            quantization = quantization_config(plan, policy.source.tensors)
            sync = disk_sync(pool, policy.source, tmp_path / "staging", group=mesh.control, quantization=quantization)
            if publish:
                sync.push(policy.export(plan), 1)
            return Pair(config, policy, plan, engine, pool, sync, tmp_path)

        yield make


def mean_abs(found: Attribution) -> dict[str, float]:
    """Return the mean absolute difference of every source, in nats."""
    return {name: float(np.abs(delta).mean()) for name, delta in found.chain.deltas.items()}


def test_in_one_precision_nothing_but_rounding_lies_between_engine_and_trainer(paired):
    found = paired(FP32).attribute(layers=True)
    sizes = mean_abs(found)
    assert sizes["decode"] < 1e-5 and sizes["kernel"] < 1e-5
    assert all(sizes[name] == 0 for name in ("activation", "sync", "weight", "recipe", "staleness"))
    assert found.faults == [] and "agree through all 4 layers" in found.verdict[2]


@pytest.mark.parametrize("precision", [FP32, FP8_BOTH], ids=["fp32", "fp8 both"])
def test_the_chain_ends_at_what_the_trainer_says_now_and_leaves_the_policy_as_it_was(paired, precision):
    pair = paired(precision)
    before = pair.policy.copy_weights()
    found = pair.attribute()
    total = np.sum(list(found.chain.deltas.values()), axis=0)
    np.testing.assert_allclose(total, found.chain.total, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.policy.copy_weights(), strict=True))
    assert pair.policy.models[0].temperature == 0.7 and not (pair.folder / "attribution").exists()


def test_a_bf16_engine_under_an_fp32_trainer_differs_in_arithmetic_and_in_rounded_weights(paired):
    sizes = mean_abs(paired(BF16_ENGINE).attribute())
    assert 1e-3 < sizes["kernel"] < 0.02 and 1e-3 < sizes["weight"] < 0.02
    assert all(sizes[name] == 0 for name in ("activation", "sync", "recipe", "staleness"))


@pytest.mark.parametrize("precision", [FP8_WEIGHTS, FP8_ENGINE, FP8_BOTH], ids=["weights", "engine", "both"])
def test_what_fp8_adds_is_found_where_fp8_is(paired, precision):
    found = paired(precision).attribute()
    sizes = mean_abs(found)
    assert sizes["weight"] > 0.01
    assert (sizes["activation"] > 0.01) == (precision is not FP8_WEIGHTS)
    assert (sizes["recipe"] > 0.01) == (precision is FP8_BOTH)
    assert sizes["sync"] == sizes["staleness"] == 0 and found.faults == []


def test_the_trainer_multiplies_as_the_engine_does_so_that_without_rounding_no_kernel_difference_is_left(paired):
    found = paired(FP8_ENGINE | {"train": "fp32"}, dtype="fp32").attribute(layers=True)
    sizes = mean_abs(found)
    assert sizes["kernel"] < 1e-3 < 0.01 < sizes["activation"]
    assert "agree through all 4 layers" in found.verdict[2]


@pytest.mark.parametrize("precision", [FP32, FP8_ENGINE], ids=["fp32", "fp8"])
def test_a_tensor_that_is_corrupted_after_the_sync_is_named_and_so_is_its_layer(paired, precision):
    pair = paired(precision)
    before = dict(pair.pool.checksums(pair.pool.live_urls[0]))
    with torch.inference_mode():
        pair.engine._batcher.weights.model.get_parameter(DOWN)[:8].neg_()
    assert pair.pool.checksums(pair.pool.live_urls[0]) == before, "the digests of what came in cannot tell"
    found = pair.attribute(layers=True)
    assert [fault.name for fault in found.faults] == [DOWN] and found.faults[0].share == pytest.approx(8 / 64, abs=0.01)
    assert found.verdict[1].startswith(
        f"sync is broken: other weights than the trainer's are served: {DOWN} on http://"
    )
    assert "part at layer 2" in found.verdict[2]
    assert mean_abs(found)["sync"] > 0.01 and found.record(1, 0)["attribution/sync/tensors"] == 1
    if precision is FP32:
        assert found.verdict[0].startswith("the largest source is sync")


def test_scales_that_were_exported_twice_too_large_are_named_though_every_digest_agrees(paired):
    pair = paired(FP8_WEIGHTS, publish=False)
    wrong = (
        (name, tensor * 2 if name == f"{DOWN}_scale_inv" else tensor) for name, tensor in pair.policy.export(pair.plan)
    )
    pair.sync.push(wrong, 1)
    found = pair.attribute(layers=True)
    assert [fault.name for fault in found.faults] == [DOWN]
    assert found.faults[0].factor == pytest.approx(2) and "2 times what was sent" in found.verdict[1]
    assert found.verdict[0].startswith("the largest source is sync") and "part at layer 2" in found.verdict[2]


def test_every_engine_is_looked_at_not_only_the_one_that_is_replayed(paired):
    pair = paired(FP32, publish=False)
    other = Engine(pair.engine.model_dir, "fp32", threads=1).start()
    with (
        serving(create_app(other, Access(save_dirs=(pair.folder,)))) as url,
        EnginePool([*pair.pool.live_urls, url], 60) as both,
    ):
        disk_sync(both, pair.policy.source, pair.folder / "other").push(pair.policy.export(pair.plan), 1)
        with torch.inference_mode():
            other._batcher.weights.model.get_parameter("model.norm.weight")[0] += 1
        found = replace(pair, pool=both, version=1).attribute()
    assert [(fault.engine, fault.name) for fault in found.faults] == [(url, "model.norm.weight")]
    assert mean_abs(found)["sync"] == 0


def test_arithmetic_that_goes_wrong_in_one_layer_of_the_trainer_is_found_there_with_equal_weights(paired):
    pair = paired(FP32)
    linear = pair.policy.models[0].decoder.layers[1].mlp.linear_fc2
    with_fault = linear.register_forward_hook(lambda _, __, output: (output[0] * 1.5, output[1]))
    found = pair.attribute(layers=True)
    with_fault.remove()
    assert found.faults == [] and found.verdict[0].startswith("the largest source is kernel")
    assert "part at layer 1" in found.verdict[2]


def test_updates_since_the_sampling_version_are_staleness_and_nothing_else(paired):
    pair = paired(FP8_ENGINE)
    plain = mean_abs(pair.attribute())
    sampled = pair.policy.copy_weights()
    pair.move(0.01)
    now = pair.policy.copy_weights()
    found = pair.attribute(sampled=sampled)
    sizes = mean_abs(found)
    assert sizes.pop("staleness") > 0.02 and plain.pop("staleness") == 0 and found.faults == []
    assert sizes == plain, "the other sources are those of the version that sampled"
    assert all(torch.equal(a, b) for a, b in zip(now, pair.policy.copy_weights(), strict=True))


def test_an_engine_that_serves_another_version_than_it_should_is_refused(paired):
    pair = paired(FP32)
    with pytest.raises(EngineError, match="under weight version 1 instead of 2"):
        replace(pair, version=2).attribute()


@contextmanager
def in_run(pair: Pair, pool: EnginePool) -> Iterator[Trainer]:
    """Yield a run before its first step, with these engines."""
    config, policy = pair.config, pair.policy
    tokenizer = char_tokenizer("0123456789+-=")
    task = make_task(TaskConfig(max_operand=12, held_out=5), tokenizer, seed=0, max_prompt_tokens=8)
    rollouts = Rollouts(config, task, tokenizer, pool, need_logmu=True)
    with RunLog(config.run.folder) as log, ProgressLine("test", 1, 0, enabled=True) as progress:
        stops = Stops(RunControl(config.run.folder), 0.0)
        note = OffloadedEngines(config.run.folder / "note")
        lead = Lead(
            rollouts, note, log, SampleLog(config.run.folder), EvaluationLog(config.run.folder), progress, stops
        )
        checkpoints = Checkpoints(config.run.folder / "checkpoints", policy, 1)
        yield Trainer(config, resolve_run(config), policy.mesh, policy, checkpoints, pair.sync, lead, TrainState())
        checkpoints.close()
        stops.close()


@pytest.mark.parametrize("place", [0, 1], ids=["the one that samples", "another"])
def test_an_engine_lost_at_an_attribution_costs_the_run_that_attribution_alone(paired, capsys, place):
    pair = paired(FP32)
    (alive,) = pair.pool.live_urls
    with serving(FastAPI()) as gone:
        pass  # no server listens at this URL any more
    urls = [alive]
    urls.insert(place, gone)
    before = pair.policy.copy_weights()
    with EnginePool(urls, 60) as pool, in_run(pair, pool) as run:
        assert attribute_step(run, before) is None
        said = capsys.readouterr().out
        assert "not attributed, 1 engine(s) left" in said and gone in said
        assert pool.live_urls == (alive,)
        assert all(torch.equal(a, b) for a, b in zip(before, pair.policy.copy_weights(), strict=True))
        found = attribute_step(run, before)
    assert found is not None and found.version == 1 and "mismatch after 1 steps: " in capsys.readouterr().out
    assert not (run.config.run.folder / "attribution").exists()


def test_a_server_that_lacks_an_endpoint_is_named_with_what_has_it(tmp_path):
    with serving(FastAPI()) as url, EnginePool([url], 60) as pool:
        with pytest.raises(
            EngineError, match=rf"{url} has no /save_weights \(404\): name a server of `megatron-rl serve` in"
        ):
            pool.save_weights(url, tmp_path)
        with pytest.raises(
            EngineError, match=r"has no /weights_checker \(404\): .* or an SGLang of a version that has it"
        ):
            pool.checksums(url)


def test_policy_and_folder_are_as_before_when_a_replay_fails(paired, monkeypatch):
    pair = paired(FP8_BOTH)
    before = pair.policy.copy_weights()

    def gone(url: str, folder: Path) -> None:
        raise EngineError("the engine is gone")

    monkeypatch.setattr(pair.pool, "save_weights", gone)
    with pytest.raises(EngineError, match="gone"):
        pair.attribute(sampled=[torch.zeros_like(one) for one in before])
    assert all(torch.equal(a, b) for a, b in zip(before, pair.policy.copy_weights(), strict=True))
    assert not (pair.folder / "attribution").exists() and pair.policy.models[0].temperature == 0.7
    linears = [pair.policy.models[0].decoder.layers[0].mlp.linear_fc1]
    assert not [one for one in linears if "_forward_impl" in vars(one)]
