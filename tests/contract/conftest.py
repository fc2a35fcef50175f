"""A tiny random model, a server of it, and weights to give that server.

The suite runs against the embedded server. To run it against another one, serve the folder named by
MEGATRON_RL_CONTRACT_MODEL (made by `make_model` below) and name the server in MEGATRON_RL_CONTRACT_URL.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_rl.rollout.lifecycle import EmbeddedServers
from megatron_rl.weights.digest import tensor_digest

VOCAB = 300
EOS = 1
EXTERNAL = os.environ.get("MEGATRON_RL_CONTRACT_URL", "")


def make_model(folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder: Qwen3 with two layers and a word-level tokenizer of the same vocabulary."""
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
    words = {"<unk>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("MEGATRON_RL_CONTRACT_MODEL")
    return Path(given) if given else make_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def url(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if EXTERNAL:
        yield EXTERNAL
        return
    with EmbeddedServers(model_dir, tmp_path_factory.mktemp("logs"), threads=1) as servers:
        yield servers.urls[0]


@pytest.fixture
def embedded_only() -> None:
    if EXTERNAL:
        pytest.skip("a promise of the embedded server alone")


@pytest.fixture
def api(url: str, model_dir: Path) -> Iterator[httpx.Client]:
    """A client of the session's server, which afterwards runs again with the weights it started with."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client
        client.post("/abort_request", json={"abort_all": True}).raise_for_status()
        client.post("/continue_generation", json={}).raise_for_status()
        if client.get("/model_info").json()["weight_version"] != "0":
            body = {"model_path": str(model_dir), "weight_version": "0"}
            client.post("/update_weights_from_disk", json=body).raise_for_status()


WriteWeights = Callable[..., Path]


@pytest.fixture
def write_weights(tmp_path: Path) -> WriteWeights:
    """Writes a folder with tensors and, for a version, the manifest of their digests."""

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
    """Weights clearly different from the ones served at first."""
    generator = torch.Generator().manual_seed(5)
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}


def logp_of(model: Qwen3ForCausalLM, prompt: list[int], output: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[len(output)] float32: log-probabilities by one plain forward pass."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + output])).logits[0].float() / temperature
    logp_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], dim=-1)
    return logp_TV.gather(1, torch.tensor(output)[:, None])[:, 0]
