"""Engines come, go and come back elsewhere; the pool follows their folder."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI

from megatron_rl import __version__
from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.registry import Registry
from megatron_rl.errors import EngineError, UserError
from megatron_rl.protocol.ready_file import remove_ready_file, write_ready_file
from tests.serving import serving


def engine() -> FastAPI:
    """Return a server that says it is healthy."""
    app = FastAPI()
    for path in ("/health", "/model_info"):
        app.get(path)(lambda: {})
    return app


def put(path: Path, url: str, pid: int = 1) -> None:
    path.write_text(json.dumps({"url": url, "pid": pid, "host": "node1"}))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_server_says_where_it_is(tmp_path):
    path = tmp_path / "new" / "engine.json"
    write_ready_file(path, "127.0.0.1", 30000)
    entry = json.loads(path.read_text())
    assert entry == {
        "url": "http://127.0.0.1:30000",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "version": __version__,
    }
    write_ready_file(path, "fe80::1", 1)
    assert json.loads(path.read_text())["url"] == "http://[fe80::1]:1"
    write_ready_file(path, "0.0.0.0", 1)
    assert json.loads(path.read_text())["url"] == f"http://{socket.gethostname()}:1"
    put(path, "http://127.0.0.1:2", pid=os.getpid() + 1)
    remove_ready_file(path)
    assert path.exists(), "it is another process's"
    write_ready_file(path, "127.0.0.1", 30000)
    remove_ready_file(path)
    assert not path.exists()
    with pytest.raises(UserError, match="--ready-file /proc/none/x cannot be written"):
        write_ready_file(Path("/proc/none/x"), "127.0.0.1", 1)


def test_files_that_name_no_engine_are_left_out_with_one_warning_each(tmp_path, caplog):
    put(tmp_path / "a.json", "http://127.0.0.1:1/")
    for name, content in {"b": "", "c": "[]", "d": "{}", "e": '{"url": 7}', "f": '{"url": "file:///etc"}'}.items():
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "a.json.partial").write_text("{")
    registry = Registry(tmp_path)
    for _ in range(2):
        assert list(registry.read()) == ["http://127.0.0.1:1"]
    assert sorted(record.args[0].name for record in caplog.records) == [
        "b.json",
        "c.json",
        "d.json",
        "e.json",
        "f.json",
    ]


def test_a_run_waits_for_as_many_engines_as_it_asked_for(tmp_path):
    registry = Registry(tmp_path / "later")
    with pytest.raises(EngineError, match=r"0 of 1 engines \(rollout\.servers\) respond after 0\.1 s; .*: none"):
        registry.wait(1, 0.1, {})
    (tmp_path / "later").mkdir()
    with serving(engine()) as url:
        put(tmp_path / "later" / "dead.json", "http://127.0.0.1:9")
        put(tmp_path / "later" / "a.json", url)
        assert registry.wait(1, 10, {}) == [url]
        with pytest.raises(EngineError, match="1 of 2 engines"):
            registry.wait(2, 0.1, {})


def test_engines_come_go_and_come_back_at_weight_updates(tmp_path):
    registry = Registry(tmp_path)
    with serving(engine()) as first, serving(engine()) as second:
        put(tmp_path / "0.json", first)
        with EnginePool([first], registry=registry) as pool:
            put(tmp_path / "1.json", second)
            until(lambda: second in pool.lost)
            assert pool.live_urls == (first,), "it gets requests only once it has weights"
            assert pool.recover_lost() == (second,) and list(pool.quarantined) == [second]
            pool.admit(second, 3)

            (tmp_path / "0.json").unlink()
            until(lambda: pool.live_urls == (second,))
            assert "not in" in pool.lost[first]
            assert pool.recover_lost() == (), "it left by itself, although it still responds"

            put(tmp_path / "back.json", first, pid=2)
            until(lambda: first in pool.lost)
            assert pool.recover_lost() == (first,)

            put(tmp_path / "1.json", second, pid=99)  # a new process at the same address has other weights
            until(lambda: "another process" in pool.lost.get(second, ""))
            assert pool.recover_lost() == (second,)


def test_an_engine_that_comes_and_is_of_no_use_stays_out(tmp_path):
    with serving(engine()) as first, serving(engine()) as second:
        put(tmp_path / "0.json", first)
        with EnginePool([first], registry=Registry(tmp_path)) as pool:
            put(tmp_path / "1.json", second)
            until(lambda: second in pool.lost)

            def refuse(url: str) -> None:
                raise EngineError(f"{url} serves another precision")

            pool.check = refuse
            assert pool.recover_lost() == () and pool.live_urls == (first,)
            assert "another precision" in pool.lost[second]
