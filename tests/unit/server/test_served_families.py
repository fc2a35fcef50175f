"""The embedded engine serves every family that the trainer trains: its log-probabilities are the trainer's."""

from pathlib import Path

import pytest
import torch

from megatron_rl.config import ParallelConfig, make_config
from megatron_rl.convert.compare_logits import packed_logits
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.model import PolicyModel
from megatron_rl.server.decode_batch import Job, Sampling
from megatron_rl.server.engine import Engine
from megatron_rl.server.requests import make_job
from megatron_rl.weights.export import export_weights
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights
from megatron_rl.weights.write_folder import write_hf_folder
from tests.families import FAMILIES_AT_TOY_SIZE, make_family
from tests.policies import build_planned_chunks

PROMPTS = [[5, 9, 11], [3], list(range(20, 60))]


@pytest.fixture(scope="module")
def mesh() -> parallel.Mesh:
    return parallel.initialize(ParallelConfig(), pick_device("cpu"), seed=0)


def generated(engine: Engine) -> list[Job]:
    jobs = [make_job(engine, prompt, Sampling(max_new_tokens=24, seed=1), 2) for prompt in PROMPTS]
    return [future.result(60) for future in engine.submit(jobs)]


def worst_difference(trained: PolicyModel, jobs: list[Job]) -> float:
    """Return the largest difference between the engine's log-probabilities of its samples and the trainer's."""
    worst = 0.0
    for job in jobs:
        for row in job.rows:
            assert row.tokens
            logits_TV = packed_logits(trained, torch.tensor([*job.prompt.tolist(), *row.tokens]))
            logp_TV = torch.log_softmax(logits_TV[len(job.prompt) - 1 : -1], -1)
            wanted = logp_TV.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
            worst = max(worst, (wanted - torch.tensor(row.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize("name", FAMILIES_AT_TOY_SIZE)
def test_an_engine_samples_with_the_trainer_s_probabilities_also_after_an_update(
    name: str, mesh: parallel.Mesh, tmp_path: Path
) -> None:
    first = make_family(tmp_path / "first", name)
    source = check_folder(HFFolder(make_family(tmp_path / "second", name, seed=1)))
    (trained,) = build_planned_chunks(make_config({"model": {"path": str(first)}}), source.shape, mesh)
    load_weights([trained], check_folder(HFFolder(first)), tp_rank=0, tp_size=1)
    engine = Engine(first).start()
    try:
        assert worst_difference(trained, generated(engine)) < 1e-4
        load_weights([trained], source, tp_rank=0, tp_size=1)
        assert worst_difference(trained, generated(engine)) > 0.01  # the trainer is one version ahead
        stream = export_weights([trained], source.family, source.shape, dtypes=source.dtypes)
        write_hf_folder(tmp_path / "v1", ((key, tensor) for key, tensor in stream if tensor is not None), source)
        engine.update_from_disk(tmp_path / "v1", "1")
        assert worst_difference(trained, generated(engine)) < 1e-4
    finally:
        engine.stop()
