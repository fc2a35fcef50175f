"""The embedded engine runs inside one process."""

import math
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from megatron_rl.errors import CheckpointError, EngineError, UserError
from megatron_rl.server.decode_batch import DecodeBatch, Job, Sampling
from megatron_rl.server.engine import Engine, JobFailed
from megatron_rl.server.requests import make_job
from megatron_rl.weights.digest import tensor_digest

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
PROMPTS = [[5, 9, 11], [3], list(range(20, 60)), [7, 8]]


def save(config: PreTrainedConfig, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(Qwen3Config(**SIZES, tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(folder).start()
    yield engine
    engine.stop()


def run(
    engine: Engine, prompts: list[list[int]] = PROMPTS, n: int = 3, tokens: int = 40, seed: int | None = 1
) -> list[Job]:
    jobs = [make_job(engine, prompt, Sampling(max_new_tokens=tokens, seed=seed), n) for prompt in prompts]
    return [future.result(60) for future in engine.submit(jobs)]


def outputs(job: Job) -> list[list[int]]:
    return [row.tokens for row in job.rows]


def worst_error(model: torch.nn.Module, jobs: list[Job]) -> float:
    """Return the largest difference between the engine's log-probabilities and those of plain forward passes."""
    worst = 0.0
    for job in jobs:
        for row in job.rows:
            with torch.no_grad():
                logits_TV = model(torch.tensor([job.prompt.tolist() + row.tokens])).logits[0].float()
            logp_TV = torch.log_softmax(logits_TV[len(job.prompt) - 1 : -1], -1)
            want = logp_TV.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
            worst = max(worst, (want - torch.tensor(row.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, tie_word_embeddings=True),
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
        MistralConfig(**SIZES, sliding_window=12),
    ],
    ids=["qwen3 tied", "qwen3 moe", "sliding window"],
)
def test_log_probs_of_every_architecture_are_those_of_a_plain_forward(config: PreTrainedConfig, tmp_path: Path) -> None:
    folder = save(config, tmp_path / "hf")
    engine = Engine(folder).start()
    try:
        jobs = run(engine)
    finally:
        engine.stop()
    assert worst_error(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), jobs) < 1e-4


def test_bf16_serves_weights_cast_from_the_file(folder: Path) -> None:
    engine = Engine(folder, dtype="bf16").start()
    try:
        jobs, (_, digests) = run(engine), engine.checksums()
    finally:
        engine.stop()
    assert worst_error(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), jobs) < 0.2
    assert digests == {name: tensor_digest(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}


def test_deterministic_samples_do_not_depend_on_the_company(folder: Path) -> None:
    engine = Engine(folder, deterministic=True).start()
    try:
        alone = [run(engine, [prompt])[0] for prompt in PROMPTS]
        together = run(engine)
        backwards = run(engine, PROMPTS[::-1])[::-1]
    finally:
        engine.stop()
    for others in (together, backwards):
        for one, other in zip(alone, others, strict=True):
            assert outputs(one) == outputs(other)
            assert [row.logprobs for row in one.rows] == [row.logprobs for row in other.rows], "bit by bit"


def test_more_samples_than_rows_are_served_in_turns(folder: Path) -> None:
    engine = Engine(folder, max_rows=4, max_prefill_tokens=64).start()
    try:
        jobs = run(engine, PROMPTS * 4, n=3, tokens=6) + run(engine, n=9, tokens=5)
    finally:
        engine.stop()
    assert [len(outputs(job)) for job in jobs] == [3] * 16 + [9] * 4
    assert all(row.finish == {"type": "length", "length": len(row.tokens)} for job in jobs for row in job.rows)


def test_without_a_seed_samples_differ_between_requests(engine: Engine) -> None:
    assert outputs(run(engine, seed=None)[0]) != outputs(run(engine, seed=None)[0])


def test_likeliest_tokens_stay_with_their_positions_through_a_retraction(engine: Engine, folder: Path) -> None:
    futures = engine.submit([make_job(engine, [4, 5], Sampling(max_new_tokens=150), n=3, top_logprobs=4)])
    while not engine._calls.call(
        lambda: engine._batcher.running is not None and engine._batcher.running.lengths.max() > 5
    ):
        assert not futures[0].done(), "it ended before anyone looked"
    engine.pause("retract")
    engine.resume()
    (job,) = [future.result(60) for future in futures]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in job.rows:
        assert row.retractions == 1 and len(row.tops) > 1, "the pieces of before and after"
        with torch.no_grad():
            logits_TV = model(torch.tensor([[4, 5, *row.tokens]])).logits[0, 1:-1].float()
        want = torch.log_softmax(logits_TV, -1).topk(4).values
        torch.testing.assert_close(torch.from_numpy(row.likeliest["logp"].copy()), want, atol=1e-4, rtol=0)


def test_more_likeliest_tokens_than_the_vocabulary_has_are_refused(engine: Engine) -> None:
    assert make_job(engine, [4], Sampling(), top_logprobs=90).top_logprobs == 90
    with pytest.raises(UserError, match=r"top_logprobs_num.*91.*vocabulary of 90"):
        make_job(engine, [4], Sampling(), top_logprobs=91)


def test_requests_still_running_at_the_end_are_aborted(folder: Path) -> None:
    engine = Engine(folder).start()
    engine.pause("in_place")
    futures = engine.submit([make_job(engine, [4, 5], Sampling(max_new_tokens=200))])
    engine.stop()
    assert futures[0].result(1).rows[0].finish["type"] == "abort"
    with pytest.raises(EngineError, match="shut down"):
        engine.submit([make_job(engine, [4, 5], Sampling())])


def spoiled(engine: Engine, n: int = 1) -> Job:
    """Return a job whose prompt the model cannot take. No request can have it, because `make_job` refuses it."""
    job = make_job(engine, [4, 5], Sampling(max_new_tokens=3), n)
    job.prompt = job.prompt + 1000
    return job


def test_an_error_of_one_job_is_that_jobs(engine: Engine) -> None:
    """The jobs are prefilled together, so the first attempt at all of them fails."""
    alone = outputs(run(engine, [[4, 5]])[0])
    engine.pause("in_place")
    jobs = [make_job(engine, [4, 5], Sampling(max_new_tokens=40, seed=1), 3), spoiled(engine, 2)]
    futures = engine.submit(jobs)
    futures += engine.submit([make_job(engine, [6], Sampling(max_new_tokens=0), 2)])
    engine.resume()
    with pytest.raises(JobFailed, match=f"request '{jobs[1].rid}' failed: IndexError: index out of range"):
        futures[1].result(20)
    assert outputs(futures[0].result(20)) == alone and futures[2].result(20).rows[0].tokens == []
    assert engine.healthy and outputs(run(engine, [[4, 5]])[0]) == alone


def test_when_decoding_fails_the_largest_job_fails_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation that fails for more than four rows stands for memory that is used up."""
    alone = outputs(run(engine, [[4, 5]])[0])
    advance = DecodeBatch.advance

    def short_of_memory(batch: DecodeBatch, logits: torch.Tensor) -> object:
        if len(batch) > 4 and int(batch.lengths.max()) > 5:
            raise MemoryError("no room")
        return advance(batch, logits)

    monkeypatch.setattr(DecodeBatch, "advance", short_of_memory)
    engine.pause("in_place")
    small = engine.submit([make_job(engine, [4, 5], Sampling(max_new_tokens=40, seed=1), 3)])
    large = engine.submit([make_job(engine, [7], Sampling(max_new_tokens=200, seed=1), 6)])
    engine.resume()
    with pytest.raises(JobFailed, match="MemoryError: no room"):
        large[0].result(20)
    assert outputs(small[0].result(20)) == alone


def test_a_model_that_cannot_compute_ends_the_engine_and_everybody_who_waits_learns_it(folder: Path) -> None:
    engine = Engine(folder).start()
    engine.pause("in_place")
    futures = engine.submit([make_job(engine, [4, 5], Sampling(max_new_tokens=100)) for _ in range(2)])
    del engine._batcher.weights.model.model.embed_tokens
    engine.resume()
    done, _ = wait(futures, 20)
    assert len(done) == 2
    with pytest.raises(EngineError, match="has stopped"):
        futures[1].result()
    assert not engine.healthy
    with pytest.raises(EngineError, match="has stopped"):
        engine.pause("abort")


def test_an_error_of_a_control_call_is_its_callers(engine: Engine) -> None:
    with pytest.raises(ValueError, match="null byte"):
        engine.save_weights(Path("/tmp/a\0b"))
    assert engine.healthy and len(run(engine, [[4]])) == 1


def test_logits_that_overflow_end_the_sample_with_a_fault(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e38)
    save_file(tensors, tmp_path / "model.safetensors")
    engine = Engine(folder).start()
    try:
        engine.update_from_disk(tmp_path, "6")
        (job,) = run(engine, [[5, 6]], n=2)
    finally:
        engine.stop()
    for row in job.rows:
        assert row.finish["err_type"] == "NonFiniteLogits"
        assert "'6'" in row.finish["message"]
        assert [math.isfinite(logprob) for logprob in row.logprobs] == [True] * (len(row.tokens) - 1) + [False]


def test_a_tied_weight_may_be_left_out_or_repeated_but_not_differ(engine: Engine, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    engine.update_from_disk(tmp_path, "1")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        engine.update_from_disk(tmp_path, "2")
    assert engine.weight_version == "1"


def test_values_that_do_not_fit_the_engines_dtype_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.finfo(torch.float32).max
    save_file(tensors, tmp_path / "model.safetensors")
    engine = Engine(folder, dtype="bf16").start()
    try:
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight does not fit"):
            engine.update_from_disk(tmp_path, "1")
    finally:
        engine.stop()


@pytest.mark.parametrize(("dtype", "match"), [("fp8", "fp8"), ("float32", "float32")])
def test_an_unknown_dtype_is_refused(folder: Path, dtype: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Engine(folder, dtype=dtype)


def test_a_folder_that_lacks_a_tensor_does_not_start(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        Engine(tmp_path)
