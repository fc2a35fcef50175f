"""Who may use an embedded server, from where, and where it may write."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError, UserError
from megatron_rl.protocol.api_key import is_loopback, new_key, read_key, write_private
from megatron_rl.protocol.server_options import ServerOptions
from megatron_rl.server.access import Access
from megatron_rl.server.app import create_app, run_server
from megatron_rl.server.engine import Engine
from tests.models import make_qwen3
from tests.serving import serving

KEY = "s3cret"
CONTROL = ("/generate", "/save_weights", "/pause_generation", "/update_weights_from_disk", "/abort_request")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("model"), tied=True, layers=1)


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a server that wants KEY and writes below one folder."""
    engine = Engine(model, threads=1).start()
    with serving(create_app(engine, Access(KEY, (tmp_path_factory.getbasetemp() / "allowed",)))) as url:
        yield url


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}, {"Api-Key": KEY}]
)
def test_without_the_key_only_health_is_answered(url, header):
    with httpx.Client(base_url=url, headers=header, timeout=60, trust_env=False) as client:
        assert client.get("/health").status_code == 200
        for path in CONTROL:
            response = client.post(path, json={})
            assert response.status_code == 401 and "API key" in response.json()["message"], path
        assert client.get("/model_info").status_code == 401
        assert client.get("/no_such_path").status_code == 401


def test_the_trainer_sends_its_key_and_says_what_to_do_about_a_wrong_one(url):
    with EnginePool([url], api_key=KEY) as pool:
        pool.wait_healthy(30)
        assert pool.info(url)["engine"] == "embedded"
        pool.pause(url, "retract")
        pool.resume(url)
    for key in (None, "wrong"):
        with EnginePool([url], api_key=key) as pool:
            pool.wait_healthy(30)
            with pytest.raises(EngineError, match=rf"{url} wants another API key \(401\): set rollout\.api_key_file"):
                pool.info(url)


def test_weights_are_written_below_the_named_folders_alone(url, tmp_path, tmp_path_factory):
    allowed = tmp_path_factory.getbasetemp() / "allowed"
    (tmp_path / "link").symlink_to(tmp_path)
    with EnginePool([url], api_key=KEY) as pool:
        pool.save_weights(url, allowed / "step" / "held")
        assert (allowed / "step" / "held" / "model.safetensors").is_file()
        (allowed / "out").symlink_to(tmp_path)
        for place in (tmp_path, allowed / ".." / "beside", allowed / "out" / "deeper", Path(f"{allowed}2")):
            with pytest.raises(EngineError, match=r"is not below a folder in which this server may write .*--save-dir"):
                pool.save_weights(url, place)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "fe80::1", "node7"])
def test_a_server_that_others_can_reach_needs_a_key(host, tmp_path):
    """The model does not exist: the address is refused before anything is loaded."""
    with pytest.raises(UserError, match=r"can be reached from other machines.*--api-key-file"):
        run_server(ServerOptions(tmp_path / "none", host=host))


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("::", False)]
)
def test_loopback_addresses_are_known(host, local):
    assert is_loopback(host) is local


def test_a_key_file_is_private_and_holds_one_key(tmp_path):
    path = tmp_path / "key"
    key = new_key()
    write_private(path, key)
    assert path.stat().st_mode & 0o777 == 0o600 and read_key(path) == key
    write_private(path, "other")
    assert read_key(path) == "other"
    path.chmod(0o640)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        read_key(path)


def test_a_new_key_can_be_an_argument_and_a_word_of_yaml():
    """SGLang makes arguments of its file of options, and takes one with `-` at its start for another option."""
    assert all(re.fullmatch("[0-9a-f]{64}", new_key()) for _ in range(100))
    assert new_key() != new_key()


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", b"\xff", b"x" * 2000])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match=f"{path} holds no API key"):
        read_key(path)
    os.mkfifo(pipe := tmp_path / "pipe", 0o600)
    with pytest.raises(UserError, match="holds no API key"):
        read_key(pipe)
    with pytest.raises(UserError, match=r"cannot be read from .*No such file"):
        read_key(tmp_path / "none")
