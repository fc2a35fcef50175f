"""A run's own server that ends is started again, but not for ever."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.revival import MOST_STARTS, Revival
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.errors import ConfigError

SERVER = """
import http.server, pathlib, sys
port, fails = int(sys.argv[1]), pathlib.Path(sys.argv[2])
left = int(fails.read_text())
if left:
    fails.write_text(str(left - 1))
    sys.exit(3)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


class Stubs(Servers):
    """Servers that answer /health, or end at their start as often as the file `fails` says."""

    noun = "stub"

    def command(self, index: int, port: int) -> list[str]:
        return [sys.executable, "-c", SERVER, str(port), str(self.log_dir / "fails")]

    def environment(self) -> dict[str, str]:
        return {}

    def fail(self, times: int) -> None:
        self.log_dir.mkdir(exist_ok=True)
        (self.log_dir / "fails").write_text(str(times))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("fails", [0, MOST_STARTS - 1, MOST_STARTS])
def test_a_server_that_ends_is_started_again_a_few_times(tmp_path: Path, caplog, fails):
    servers = Stubs(tmp_path, 2, 30.0)
    servers.fail(0)
    with servers, EnginePool(servers.urls) as pool, closing(Revival(servers, pool)):
        servers.fail(fails)
        first, second = servers.urls
        servers.process(0).process.kill()
        if fails == MOST_STARTS:
            until(lambda: "the run goes on without it" in caplog.text)
            assert pool.live_urls == (second,) and pool.recover_lost() == () and pool.more_may_come()
            assert caplog.text.count("is started again") == MOST_STARTS and "code 3" in caplog.text
            return
        until(lambda: any("was started again" in why for why in pool.lost.values()))
        assert servers.urls[0] != first and pool.live_urls == (second,)
        assert pool.recover_lost() == (servers.urls[0],), "at the next weight update"
        assert set(pool.quarantined) == {servers.urls[0]} and set(pool.live_urls) == set(servers.urls)
        assert caplog.text.count("is started again") == fails + 1


def test_a_weight_update_waits_for_a_server_if_no_other_is_left(tmp_path: Path):
    servers = Stubs(tmp_path, 1, 30.0)
    servers.fail(0)
    with servers, EnginePool(servers.urls) as pool, closing(Revival(servers, pool)):
        pool.patience_s = 30
        servers.process(0).process.kill()
        until(lambda: not pool.live_urls)
        assert pool.recover_lost() == servers.urls == pool.live_urls


def test_a_server_that_comes_back_and_is_of_no_use_is_not_used(tmp_path: Path):
    servers = Stubs(tmp_path, 2, 30.0)
    servers.fail(0)

    def refuse(url: str) -> None:
        raise ConfigError(f"{url} is not deterministic")

    with servers, EnginePool(servers.urls) as pool, closing(Revival(servers, pool)):
        pool.check = refuse
        servers.process(0).process.kill()
        until(lambda: any("was started again" in why for why in pool.lost.values()))
        assert pool.recover_lost() == () and pool.live_urls == servers.urls[1:]
        assert "not deterministic" in pool.lost[servers.urls[0]]
