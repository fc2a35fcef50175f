"""Engines report the experts chosen for every token. A client that requests them refuses a response without them."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from megatron_rl.config import PrecisionConfig
from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.sglang import SGLangServers, server_flags
from megatron_rl.errors import EngineError
from megatron_rl.precision.plan import resolve
from megatron_rl.protocol.generation import RoutedShape
from megatron_rl.sampling.group import GroupSettings, sample_group
from megatron_rl.types import Prompt, Trajectory
from tests.contract.conftest import SGLANG, VOCAB, until_running, write_tokenizer
from tests.models import make_qwen3_moe

LAYERS, EXPERTS, PER_TOKEN = 2, 8, 2
SHAPE = RoutedShape(LAYERS, PER_TOKEN, EXPERTS)
PROMPT = tuple(range(10, 35))


def make_moe(folder: Path, seed: int = 0) -> Path:
    make_qwen3_moe(
        folder,
        vocab=VOCAB,
        layers=LAYERS,
        experts=EXPERTS,
        per_token=PER_TOKEN,
        hidden_size=128,
        moe_intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        seed=seed,
    )
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "hf")


@pytest.fixture(scope="session")
def plain(moe_dir: Path) -> Qwen3MoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def moe_url(engine: str, moe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    logs = tmp_path_factory.mktemp("logs")
    flags = server_flags(
        resolve(PrecisionConfig(), LAYERS, engine="sglang", device="cpu"), SGLANG, device="cpu", routing=True
    )
    embedded = engine == "embedded"
    with (
        EmbeddedServers(moe_dir, logs, 1, threads=1)
        if embedded
        else SGLangServers(moe_dir, logs, flags, SGLANG, 1) as servers
    ):
        yield servers.urls[0]


def request(rid: str, prompt: tuple[int, ...] = PROMPT, n: int = 1, tokens: int = 40) -> GenerationRequest:
    return GenerationRequest(rid, prompt, n, SamplingParams(tokens, ignore_eos=True, seed=7), routed=SHAPE)


def chosen(model: Qwen3MoeForCausalLM, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the experts of one plain forward pass, sorted, and the margin of the last one.

    The shapes are [T - 1, L, K] and [T - 1, L].
    """
    logits: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda gate, args, out: logits.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([tokens[:-1]]))
    for hook in hooks:
        hook.remove()
    best = torch.stack(logits, 1).topk(PER_TOKEN + 1, -1)
    return best.indices[..., :PER_TOKEN].sort(-1).values.numpy(), (best.values[..., -2] - best.values[..., -1]).numpy()


def test_the_reported_experts_are_those_of_a_plain_forward_pass(moe_url: str, plain: Qwen3MoeForCausalLM) -> None:
    """This holds for prompt and response tokens, for samples that share a prompt, and for a repeated prompt."""
    with EnginePool([moe_url]) as pool:
        first = pool.generate([request("one", n=3), request("two", PROMPT[:7], tokens=90)])
        longer = PROMPT + tuple(first[0][0].tokens[:20].tolist())
        again = pool.generate([request("again", longer, tokens=5)])
    asked = [(PROMPT, sample) for sample in first[0]] + [(PROMPT[:7], first[1][0])]
    for prompt, sample in [*asked, (longer, again[0][0])]:
        wanted, ahead = chosen(plain, [*prompt, *sample.tokens.tolist()])
        assert sample.routing is not None and sample.routing.dtype == np.int32
        assert sample.routing.shape == (len(prompt) + len(sample.tokens) - 1, LAYERS, PER_TOKEN)
        clear = ahead > 1e-4  # rounding may choose among experts with almost equal scores
        assert clear.mean() > 0.99
        assert np.array_equal(np.sort(sample.routing, -1)[clear], wanted[clear])
    assert len(np.unique(first[0][0].routing)) > PER_TOKEN


def test_experts_are_reported_to_those_who_ask_alone(moe_url: str) -> None:
    body = {"input_ids": list(PROMPT), "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    with httpx.Client(base_url=moe_url, timeout=60, trust_env=False) as client:
        without = client.post("/generate", json=body).raise_for_status().json()
        with_them = client.post("/generate", json={**body, "return_routed_experts": True}).raise_for_status().json()
    assert without["meta_info"].get("routed_experts") is None
    coded = base64.b64decode(with_them["meta_info"]["routed_experts"])
    assert len(coded) == 4 * (len(PROMPT) + 4 - 1) * LAYERS * PER_TOKEN


def test_experts_of_another_model_are_refused(moe_url: str) -> None:
    """The request expects 3 layers and the model has 2, so the numbers would be assigned to wrong tokens."""
    with EnginePool([moe_url]) as pool:
        wrong = GenerationRequest("wrong", PROMPT, 1, SamplingParams(4, ignore_eos=True), routed=RoutedShape(3, 2, 8))
        with pytest.raises(EngineError, match=r"routed_experts hold 112 numbers for 28 tokens, 3 x 2 each"):
            pool.generate([wrong])


def test_a_retracted_request_reports_every_token_once(moe_url: str, plain: Qwen3MoeForCausalLM, engine: str) -> None:
    with EnginePool([moe_url]) as pool, EnginePool([moe_url]) as operator:
        running = pool.start(pool.sample(request("retracted", tokens=450)))
        for _ in range(3):
            time.sleep(0.2)
            operator.pause(moe_url, "retract")
            operator.resume(moe_url)
        (sample,) = running.result()
    assert sample.retractions > 0 or engine == "sglang"
    wanted, ahead = chosen(plain, [*PROMPT, *sample.tokens.tolist()])
    assert sample.routing is not None
    assert np.array_equal(np.sort(sample.routing, -1)[ahead > 1e-4], wanted[ahead > 1e-4])


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_the_experts_of_a_token_are_those_of_the_weights_that_sampled_it(
    moe_url: str, moe_dir: Path, plain: Qwen3MoeForCausalLM, engine: str, mode: str, tmp_path: Path
) -> None:
    """This also holds during a weight update."""
    if (engine, mode) == ("sglang", "retract"):
        pytest.skip("SGLang chooses the experts of retracted tokens again: rollout.routing_replay is refused with it")
    other = make_moe(tmp_path / "hf", seed=1)
    settings = GroupSettings(0, 2, 450, 1.0, (), need_logmu=False, routed=SHAPE, updates=1)

    def sampled_through_an_update(wait: float) -> list[Trajectory]:
        """Return trajectories with at least two tokens of the old weights, and some of the new ones."""
        with EnginePool([moe_url]) as pool, httpx.Client(base_url=moe_url, timeout=60, trust_env=False) as client:
            running = pool.start(sample_group(pool.sample, Prompt("p", "", PROMPT, ""), settings, first_id=0, group=0))
            until_running(client)
            time.sleep(wait)
            pool.pause(moe_url, mode)
            pool.update_weights_from_disk(moe_url, other, 1)
            if mode != "in_place":
                pool.flush(moe_url)
            pool.resume(moe_url)
            trajectories = running.result().trajectories
            pool.update_weights_from_disk(moe_url, moe_dir, 0)
        return [t for t in trajectories if len(t.sampled_by) == 2 and (t.columns["versions"] == 0).sum() > 1]

    waits = (0.1, 0.4, 1.6)  # how fast a server samples depends on the machine
    through = next(filter(None, map(sampled_through_an_update, waits)), [])
    newer = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    assert through, "no sample was running"
    for trajectory in through:
        tokens = [*PROMPT, *trajectory.response_tokens.tolist()]
        cut = len(PROMPT) + int((trajectory.columns["versions"] == 0).sum()) - 1
        assert trajectory.routing is not None and len(trajectory.routing) == len(tokens) - 1
        for model, rows in ((plain, slice(0, cut)), (newer, slice(cut, None))):
            wanted, ahead = chosen(model, tokens)
            told = trajectory.routing[rows]
            if model is newer and mode == "in_place":
                continue  # its experts depend on keys of both models
            clear = ahead[rows] > 1e-4
            assert np.array_equal(np.sort(told, -1)[clear], wanted[rows][clear])
        assert not np.array_equal(np.sort(trajectory.routing[:cut], -1), chosen(newer, tokens)[0][:cut])


def test_an_engine_of_a_dense_model_says_that_it_has_no_experts(url: str, engine: str) -> None:
    """SGLang without its flag returns 200 without experts. The client must refuse this response."""
    words = "routers of a 'qwen3' model are not known" if engine == "embedded" else "--enable-return-routed-experts"
    with EnginePool([url]) as pool, pytest.raises(EngineError, match=words):
        pool.generate([request("dense")])
