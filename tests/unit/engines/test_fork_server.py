"""The fork server starts commands as new processes would, and none of them outlives who asked for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MAIN = """
import os, sys, time
print("ran", sys.argv[1:], os.getsid(0) == os.getpid(), os.environ.get("MARK"), flush=True)
time.sleep(60) if sys.argv[1] == "slow" else sys.exit(7)
"""
LAUNCHER = """
import json, os, signal, sys, time
from pathlib import Path
root, fake, log = sys.argv[1:]
sys.path.insert(0, root)
import megatron_rl
megatron_rl.__path__.insert(0, fake)  # its __main__ is the test's
from megatron_rl.engines.processes import fork_server as f
import numpy, torch  # what a forked server resets

def start(which):
    return f.fork_command([which], 31234, {**os.environ, "OMP_NUM_THREADS": "1", "MARK": which}, Path(log))

def gone(pid):
    for _ in range(100):
        if not f._lives(pid):
            return True
        time.sleep(0.1)
    return False

server = f.ForkServer(modules=("json",))
os.environ.update(server.environment)
found = {"forks": f.fork_server_pid() is not None, "quick": start("quick").wait(60)}
slow = start("slow")
while Path(f"/proc/{slow.pid}/comm").read_text() != "mrl-serve-31234\\n":
    time.sleep(0.05)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # a scheduler's, for rank 0 alone
    slow.send_signal(number)
time.sleep(0.2)
# What a call leaves behind that Ctrl-C interrupts before it reads its response.
slow._connection.sendall(json.dumps({"forks": True, "number": -1}).encode() + b"\\n")
found["heard"] = slow.poll()
slow.send_signal(signal.SIGKILL)
found["killed"] = slow.wait(60)
reader, writer = os.pipe()
if os.fork() == 0:  # a client that ends without stopping its server
    os.write(writer, b"%d" % start("slow").pid)
    os._exit(0)
os.wait()
found["orphan"] = gone(int(os.read(reader, 20)))
left = start("slow")
server.close()
found["left"] = gone(left.pid)
found["ended"] = left.poll()
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="servers are forked on Linux only")
def test_forked_servers_run_as_commands_and_end_with_who_asked_for_them(tmp_path):
    fake = tmp_path / "megatron_rl"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(MAIN)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    log = tmp_path / "log"
    command = [sys.executable, str(tmp_path / "launcher.py"), str(ROOT), str(fake), str(log)]
    env = {"PATH": "", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended
    assert json.loads(ended.stdout.splitlines()[-1]) == {
        "forks": True,
        "quick": 7,
        "heard": None,
        "killed": -9,
        "orphan": True,
        "left": True,
        "ended": -9,
    }
    assert log.read_text().splitlines()[0] == "ran ['quick'] True quick"
