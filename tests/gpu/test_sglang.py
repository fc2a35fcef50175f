"""An SGLang server on a GPU gets a trainer's weights through files and through CUDA IPC, and has its probabilities."""

import pytest

from megatron_rl.config import PrecisionConfig
from tests.contract.conftest import SGLANG, start_servers
from tests.contract.test_families import write_byte_tokenizer
from tests.gpu.needs import CUDA
from tests.models import make_qwen3
from tests.parallel.group import RankGroup

READY = CUDA and SGLANG.python.exists()
pytestmark = pytest.mark.skipif(not READY, reason="needs a CUDA device and .venv-sglang (make sglang GPU=1)")
SECTIONS = {"precision": {"train": "bf16"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model whose heads have the width that SGLang's kernels want."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = make_qwen3(tmp_path_factory.mktemp("served"), tied=False, layers=2, head_dim=64, **sizes)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """Yield the address of a server on GPU 0, which it shares with the trainer."""
    settings = SGLANG.model_copy(update={"mem_fraction": 0.3})
    options = {"precision": PrecisionConfig(**SECTIONS["precision"]), "settings": settings, "device": "cuda"}
    with start_servers("sglang", model, tmp_path_factory.mktemp("logs"), **options) as servers:
        yield servers.urls[0]


@pytest.mark.parametrize("transport", ["disk", "tensor"])
def test_a_server_has_the_weights_of_the_trainer_after_an_update_alone(model, url, tmp_path, transport):
    """bf16 products differ by their rounding; a step of this learning rate moves the probabilities by far more."""
    group = RankGroup(1)
    try:
        staging = tmp_path / "staging" if transport == "disk" else None
        (found,) = group.run(
            "tests.parallel.sync_steps",
            "update_live_engine",
            model=model,
            layout={},
            url=url,
            staging=staging,
            **SECTIONS,
        )
    finally:
        group.close()
    _, ahead, pushed = found
    assert pushed < 0.25 < 0.5 < ahead
