"""A tiny random model, a server of it, and weights for that server.

Every test that takes `engine`, `url` or `api` runs against the embedded server. It also runs against SGLang if
`make sglang` was run. One server of each kind serves all tests of this folder and ends after them. Tests that take
`embedded_only` hold only for the embedded server, those that take `sglang_only` only for SGLang.

Differences of SGLang 0.5.23 on CPU from the embedded server, and how they are handled:
- `sampling_seed` is ignored: `rollout.deterministic` is refused with SGLang.
- With top_k and top_p, log-probabilities are of the whole distribution: training samples with neither.
- /abort_request has no effect on a request for n > 1 samples, because each sample has its own id. The client closes the
  connection, and the server checks for that every second (SGLANG_REQUEST_STATE_WAIT_TIMEOUT, set at its start).
- An update from disk with flush_cache: true returns 400 if the cache is in use. The new weights are then loaded, and
  /model_info reports the old version. The client sends flush_cache: false and flushes in a separate call. Without that
  flush, retracted requests resume with keys and values of the old weights, from the prefix cache.
- A damaged safetensors file ends the server. So does a negative token id. A token id beyond the vocabulary is accepted.
- Unknown keys are ignored, unknown keys of sampling_params are refused; n: 0 is accepted as 1.
- /weights_checker reports fused parameters; its digests are not hashes of the tensors that were sent.
- /flush_cache and /abort_request do not return JSON.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_rl.config import PrecisionConfig, SGLangConfig
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.engines.processes.sglang import SGLangServers, server_flags
from megatron_rl.precision.plan import resolve
from megatron_rl.types import TokenIds
from megatron_rl.weights.digest import tensor_digest

VOCAB = 300
EOS = 1
SGLANG = SGLangConfig(python=Path(__file__).parents[2] / ".venv-sglang/bin/python")
without_sglang = pytest.mark.skipif(not SGLANG.python.exists(), reason="no .venv-sglang here: `make sglang` makes it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        engines = ["embedded", pytest.param("sglang", marks=without_sglang)]
        wanted = {"embedded_only": engines[:1], "sglang_only": engines[1:]}
        promised = next((wanted[name] for name in wanted if name in metafunc.fixturenames), engines)
        metafunc.parametrize("engine", promised, indirect=True, scope="package")


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write a Hugging Face folder: Qwen3 with two layers, and a word-level tokenizer of the same vocabulary."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer. SGLang's first request to itself is text, which would have no tokens without a tokenizer."""
    words = {"<unk>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def engine(request: pytest.FixtureRequest) -> str:
    """Return the kind of server at `url`: `embedded` or `sglang`."""
    return str(request.param)


def start_servers(
    engine: str,
    model_dir: Path,
    logs: Path,
    count: int = 1,
    *,
    precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008  (frozen)
    settings: SGLangConfig = SGLANG,
    device: str = "cpu",
) -> Servers:
    """Return servers, not yet healthy. Enter the context or call `wait_healthy`.

    Args:
        engine: `embedded` or `sglang`. The embedded one computes in fp32 on a CPU.
        model_dir: the Hugging Face folder to serve.
        logs: folder for the log files.
        count: number of servers.
        precision: number formats of SGLang.
        settings: settings of SGLang.
        device: device of SGLang, cpu or cuda.
    """
    if engine == "embedded":
        return EmbeddedServers(model_dir, logs, count, threads=1, save_dirs=(Path("/"),))
    flags = server_flags(resolve(precision, 2, engine="sglang", device=device), settings, device=device)
    return SGLangServers(model_dir, logs, flags, settings, count, device)


@pytest.fixture(scope="package")
def url(engine: str, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_servers(engine, model_dir, tmp_path_factory.mktemp("logs")) as servers:
        yield servers.urls[0]


@pytest.fixture
def embedded_only() -> None:
    """The test does not run against SGLang; see `pytest_generate_tests`."""


@pytest.fixture
def sglang_only() -> None:
    """The test does not run against the embedded server."""


@pytest.fixture
def api(url: str, model_dir: Path) -> Iterator[httpx.Client]:
    """Yield a client of the session's server. Afterwards the server runs again, with its first weights."""
    with httpx.Client(base_url=url, timeout=240, trust_env=False) as client:
        yield client
        client.post("/abort_request", json={"abort_all": True}).raise_for_status()
        client.post("/continue_generation", json={}).raise_for_status()
        if client.get("/model_info").json()["weight_version"] != "0":
            body = {"model_path": str(model_dir), "weight_version": "0", "flush_cache": True}
            client.post("/update_weights_from_disk", json=body).raise_for_status()


def until_running(client: httpx.Client, request: Future[Any] | None = None) -> None:
    """Wait until a request has keys and values, so that the cache cannot be flushed.

    Raise the error of `request` if it has ended with one.
    """
    end = time.monotonic() + 30
    while client.post("/flush_cache", json={}).status_code == 200:
        if request is not None and request.done():
            pytest.fail(f"it ended before it was seen to run: {request.result()}")
        assert time.monotonic() < end, "no request came to run"
        time.sleep(0.02)


WriteWeights = Callable[..., Path]


@pytest.fixture
def write_weights(tmp_path: Path) -> WriteWeights:
    """Return a function that writes a folder with tensors and, if a version is given, the manifest of their digests."""

    def write(tensors: dict[str, torch.Tensor], version: int | None = None, folder: str = "weights") -> Path:
        path = tmp_path / folder
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        if version is not None:
            digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
            (path / "manifest.json").write_text(json.dumps({"version": version, "tensors": digests}))
        return path

    return write


@pytest.fixture
def other_tensors(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """Return weights that differ clearly from the first ones of the server."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def logp_of(model: Qwen3ForCausalLM, prompt: TokenIds, output: TokenIds, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities of `output` from one plain forward pass: [len(output)] float32."""
    prompt, output = [int(token) for token in prompt], [int(token) for token in output]
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + output])).logits[0].float() / temperature
    logp_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], dim=-1)
    return logp_TV.gather(1, torch.tensor(output)[:, None])[:, 0]
