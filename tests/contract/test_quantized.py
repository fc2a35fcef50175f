"""A server with FP8 weights and inputs computes as specified, and refuses weights that it cannot hold."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from megatron_rl.config import PrecisionConfig
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.sglang import write_as_sent
from megatron_rl.engines.requirements import check_server_precision
from megatron_rl.errors import CheckpointError, EngineError, PrecisionError
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.plan import PrecisionPlan, resolve
from megatron_rl.protocol.server_options import EngineQuantization
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weight_sync.transports.disk import DiskTransport
from megatron_rl.weight_sync.transports.distributed import DistributedTransport
from megatron_rl.weight_sync.transports.tensor import TensorTransport
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.hf_folder import SINGLE, HFFolder
from megatron_rl.weights.quantized import WireTensors, quantization_config
from tests.contract.conftest import logp_of
from tests.contract.test_weight_sync import HookedPool, rewrite
from tests.models import make_qwen3
from tests.policies import embedded_plan

PRECISION = PrecisionConfig(train="bf16", rollout="fp8_blockwise", rollout_activations="fp8")
PROMPT = [5, 17, 250, 99, 3]
BUCKET = 20_000  # bytes; the tiny model then has a dozen buckets
KEY, VALUE = (f"model.layers.1.self_attn.{part}_proj.weight_scale_inv" for part in "kv")
Spoil = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def plan() -> PrecisionPlan:
    return embedded_plan(PRECISION, num_layers=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of odd sizes: scales after the codes would not be aligned, and the last tiles are incomplete."""
    return make_qwen3(tmp_path_factory.mktemp("model"), tied=False, layers=2, hidden_size=65, intermediate_size=131)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield a server that computes in fp32, so that a plain forward pass has the same result up to rounding."""
    engine_quantization = EngineQuantization.of(PRECISION)
    with EmbeddedServers(
        model, tmp_path_factory.mktemp("logs"), threads=1, engine_quantization=engine_quantization
    ) as servers:
        yield servers.urls[0]


@pytest.fixture
def pool(server: str, model: Path) -> Iterator[HookedPool]:
    with HookedPool([server], timeout_s=60) as pool:
        pool.update_weights_from_disk(server, model, 0)
        pool.resume(server)
        yield pool


@pytest.fixture
def sync(
    request: pytest.FixtureRequest, pool: HookedPool, plan: PrecisionPlan, model: Path, tmp_path: Path
) -> Iterator[WeightSync]:
    """Yield a sync over the disk transport, or over each transport if the test uses `every_transport`."""
    source = HFFolder(model)
    transports = {
        "disk": DiskTransport(source, tmp_path / "staging", quantization=quantization_config(plan, source.tensors)),
        "distributed": DistributedTransport(BUCKET, 60.0, torch.device("cpu")),
        "tensor": TensorTransport(BUCKET),
    }
    sync = WeightSync(pool, source, transports[getattr(request, "param", "disk")])
    yield sync
    sync.close()


every_transport = pytest.mark.parametrize("sync", ["disk", "distributed", "tensor"], indirect=True)


def weights(source: Path, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the source's weights as a bf16 trainer holds them, plus noise of that seed; no noise for seed 0."""
    folder, generator = HFFolder(source), torch.Generator().manual_seed(seed)
    for name in folder.tensors:
        stored = folder.read(name)
        moved = stored + 0.05 * torch.randn(stored.shape, generator=generator) if seed else stored
        yield name, moved.bfloat16()


def reference(source: Path, seed: int, plan: PrecisionPlan, inputs: bool = True) -> Qwen3ForCausalLM:
    """Return a plain fp32 model with the fake-quantized weights of that seed. `inputs` also quantizes linear inputs."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    served = dict(weights(source, seed))
    if not seed:  # as the server loads them at its start: unquantized weights stay fp32
        served |= {name: HFFolder(source).read(name) for name in served if not plan.quantized(name)}
    values = {
        name: fake_quantize(t, plan.wire, torch.float32) if plan.quantized(name) else t for name, t in served.items()
    }
    model.load_state_dict(values)
    for name, module in model.named_modules():
        if inputs and isinstance(module, nn.Linear) and plan.quantized(f"{name}.weight"):
            module.register_forward_pre_hook(lambda _, args: (quantized_rows(args[0], plan.engine_inputs),))
    return model


def quantized_rows(x: Tensor, fmt: str) -> Tensor:
    return fake_quantize(x.flatten(0, -2), fmt).view_as(x)


def answer(url: str, tokens: int = 60) -> tuple[list[int], Tensor]:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "sampling_seed": 7}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
    found = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).json()
    return found["output_ids"], torch.tensor([pair[0] for pair in found["meta_info"]["output_token_logprobs"]])


def assert_fake_quantized(server: str, model: Path, seed: int, plan: PrecisionPlan) -> None:
    """Compare the mean, not every token: an input's code may change where two sums differ in their last bit."""
    output, found = answer(server)
    error = (found - logp_of(reference(model, seed, plan), PROMPT, output)).abs()
    weights_alone = (found - logp_of(reference(model, seed, plan, inputs=False), PROMPT, output)).abs()
    assert error.median() < 1e-4
    assert error.mean() < 0.1 * weights_alone.mean()


def test_logprobs_are_those_of_fake_quantized_weights_and_inputs(
    pool: HookedPool, plan: PrecisionPlan, model: Path, server: str
) -> None:
    assert_fake_quantized(server, model, 0, plan)


@every_transport
def test_codes_and_scales_are_confirmed_by_their_digests_and_served(
    pool: HookedPool, sync: WeightSync, plan: PrecisionPlan, model: Path, server: str
) -> None:
    sent = dict(WireTensors(weights(model, 1), plan))
    assert {tensor.element_size() for tensor in sent.values()} == {1, 2, 4} and any(t.nbytes % 4 for t in sent.values())
    report = sync.push(WireTensors(weights(model, 1), plan), 1)
    assert report.nbytes == sum(tensor.nbytes for tensor in sent.values()) > 8 * BUCKET
    assert pool.checksums(server) == {name: tensor_digest(tensor) for name, tensor in sent.items()}
    assert_fake_quantized(server, model, 1, plan)


def flipped_bit(tensors: dict[str, Tensor]) -> None:
    tensors[KEY].view(torch.int32)[0, 0] ^= 1


def swapped_scales(tensors: dict[str, Tensor]) -> None:
    tensors[KEY], tensors[VALUE] = tensors[VALUE], tensors[KEY]


def dropped_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[KEY]


def negative_scale(tensors: dict[str, Tensor]) -> None:
    tensors[KEY].neg_()


@pytest.mark.parametrize(
    ("spoil", "manifest", "words"),
    [
        (flipped_bit, False, f"digest of tensor {KEY} is"),
        (flipped_bit, True, f"tensor '{KEY}' should have digest"),
        (swapped_scales, True, f"tensor '{KEY}' should have digest"),
        (dropped_scale, True, f"tensor {KEY} is missing"),
        (negative_scale, True, f"tensor {KEY} has scales that are not finite or not above 0"),
    ],
)
def test_spoiled_scales_are_refused_and_the_old_weights_serve_on(
    pool: HookedPool,
    sync: WeightSync,
    plan: PrecisionPlan,
    model: Path,
    server: str,
    spoil: Spoil,
    manifest: bool,
    words: str,
) -> None:
    sync.push(WireTensors(weights(model, 1), plan), 1)
    before, held = answer(server), pool.checksums(server)

    def hook(_: str, folder: Path, version: int) -> int:
        assert KEY in load_file(folder / SINGLE)
        rewrite(folder, spoil, manifest=manifest)
        return version

    pool.hook = hook
    with pytest.raises(EngineError, match=words):
        sync.push(WireTensors(weights(model, 2), plan), 2)
    after = answer(server)
    assert after[0] == before[0] and torch.equal(after[1], before[1])
    assert pool.checksums(server) == held and pool.weight_version(server) == "1"


def test_codes_without_a_word_in_config_json_are_refused(
    pool: HookedPool, sync: WeightSync, plan: PrecisionPlan, model: Path
) -> None:
    def hook(_: str, folder: Path, version: int) -> int:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        return version

    pool.hook = hook
    with pytest.raises(EngineError, match=r"is a scale, but config\.json has no quantization_config"):
        sync.push(WireTensors(weights(model, 1), plan), 1)


def test_a_weight_that_is_not_finite_reaches_no_engine(
    pool: HookedPool, sync: WeightSync, plan: PrecisionPlan, model: Path, server: str
) -> None:
    def spoiled() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(model, 1):
            if name == "model.layers.1.mlp.up_proj.weight":
                tensor[0, 0] = float("inf")
            yield name, tensor

    before = answer(server)
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds values that are not finite"
    ):
        sync.push(WireTensors(spoiled(), plan), 1)
    assert torch.equal(answer(server)[1], before[1]) and pool.weight_version(server) == "0"


def test_a_run_finds_out_which_precision_a_server_has(
    pool: HookedPool, server: str, url: str, embedded_only: None
) -> None:
    said = pool.info(server)
    assert (said["dtype"], said["quantization"], said["activations"]) == ("fp32", "fp8_blockwise", "fp8")
    check_server_precision(server, {**said, "dtype": "bf16"}, PRECISION)
    with pytest.raises(PrecisionError, match=f"{server} serves another precision.*dtype fp32 instead of bf16"):
        check_server_precision(server, said, PRECISION)
    with HookedPool([url]) as plain:
        check_server_precision(url, plain.info(url), PrecisionConfig())
        with pytest.raises(PrecisionError, match=f"{url} serves another.*quantization None instead of fp8_blockwise"):
            check_server_precision(url, plain.info(url), PRECISION)


@pytest.mark.parametrize("rollout", ["fp8_blockwise", "fp8_blockwise_pow2"])
def test_sglang_on_cpu_serves_the_values_of_the_codes(
    api: httpx.Client, url: str, sglang_only: None, model_dir: Path, tmp_path: Path, rollout: str
) -> None:
    chosen = resolve(PrecisionConfig(train="bf16", rollout=rollout), 2, engine="sglang", device="cpu")
    write_as_sent(model_dir, chosen, tmp_path / "sent")
    with HookedPool([url]) as pool:
        pool.update_weights_from_disk(url, tmp_path / "sent", 1)
        pool.flush(url)
    output, found = answer(url)
    expected = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    served = {name: HFFolder(model_dir).read(name).bfloat16() for name in HFFolder(model_dir).tensors}
    values = {
        name: fake_quantize(t, chosen.wire, torch.bfloat16) if chosen.quantized(name) else t
        for name, t in served.items()
    }
    expected.load_state_dict(values)
    torch.testing.assert_close(found, logp_of(expected, PROMPT, output), atol=1e-4, rtol=0)
