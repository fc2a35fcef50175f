"""A shortage of this process's own open files delays a request; it is not blamed on the engine."""

import errno
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_rl.engines.patient_transport import local_shortage
from tests.unit.engines.scripted_server import Reply, ScriptedServer, right_samples

ROOT = Path(__file__).resolve().parents[3]
# The process has no free file: one request waits until files are free, another gives up.
SCRIPT = """
import asyncio, json, os, resource, sys
sys.path.insert(0, sys.argv[1])
url = sys.argv[2]
import httpx
from megatron_rl.engines import patient_transport as p
from megatron_rl.errors import EngineError

async def main():
    found = {}
    transport = p.PatientTransport(limits=httpx.Limits(max_keepalive_connections=0))
    async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=30) as client:
        await client.get(url)  # imports what a request needs
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        def hold():
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
        def free():
            while held:
                os.close(held.pop())
        hold()
        waiting = asyncio.create_task(client.get(url))
        await asyncio.sleep(0.5)
        found["waited"] = not waiting.done()
        free()
        found["status"] = (await waiting).status_code
        hold()
        p._WAIT_S = 0.2
        try:
            await client.get(url)
        except EngineError as error:
            found["error"] = str(error)
        free()
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it fills the table of open files")
def test_a_request_waits_for_a_free_file_and_then_names_this_machine():
    with ScriptedServer() as server:
        command = [sys.executable, "-c", SCRIPT, str(ROOT), f"{server.url}/health"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["waited"] and found["status"] == 200
    assert "this machine cannot open another connection (Too many open files)" in found["error"]
    assert "ulimit -n" in found["error"]


# Two engines that take a moment are asked for more samples at once than this process may have open files.
CROWD = """
import json, resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams

urls, hard = sys.argv[2:], 300
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
with EnginePool(urls, timeout_s=60) as pool:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    asked = [GenerationRequest(f"r{at}", (5,), 1, SamplingParams(max_new_tokens=4)) for at in range(400)]
    samples = pool.generate(asked)
    print(json.dumps({"soft": soft == hard, "answered": len(samples), "live": len(pool.live_urls)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of open files differ")
def test_more_requests_than_open_files_lose_no_engine_and_the_limit_is_raised():
    """As in https://github.com/sgl-project/sglang/issues/7551 and https://github.com/Ziems/arbor/issues/48."""

    def slow(path: str, body: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return Reply(right_samples(body))

    with ScriptedServer(slow) as one, ScriptedServer(slow) as two:
        command = [sys.executable, "-c", CROWD, str(ROOT), one.url, two.url]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"soft": True, "answered": 400, "live": 2}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EADDRNOTAVAIL, "no port"), "Cannot assign requested address"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "name resolution"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), None),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), None),
        (RuntimeError("another one"), None),
    ],
    ids=str,
)
def test_a_shortage_of_this_machine_is_told_from_a_fault_of_the_engine(error: Exception, words: str | None) -> None:
    """httpx raises its own error from that of the operating system."""
    raised = httpx.ConnectError("All connection attempts failed")
    raised.__cause__ = error
    found = local_shortage(raised)
    assert found is None if words is None else found is not None and words in found[0] and found[1]
