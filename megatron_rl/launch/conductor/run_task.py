"""One task of a step: it runs the command of a role, and records how that ended.

srun returns the highest exit code of a step. When it kills the other ranks after rank 0's exit code 2, that is 137.
"""

import os
import signal
import socket
import subprocess
import time
from typing import Any, Dict, List, Optional, Sequence

from megatron_rl.launch.conductor.control_files import read_json, remove, write_json

_FOLDER = "exits"  # in the folder of an attempt's logs


def run_task(logs: str, role: str, command: Sequence[str]) -> int:
    """Run a command to its end, write its exit code to the attempt's folder, and return it.

    A signal to a step reaches every process of it, so this one ignores what the command handles.
    """
    for name in ("TERM", "INT", "USR1", "USR2", "HUP"):
        signal.signal(getattr(signal, "SIG" + name), _ignore)  # not SIG_IGN, which the command would inherit
    try:
        code = subprocess.Popen(list(command)).wait()
    except OSError as error:
        print("%s cannot be started: %s" % (command[0], error), flush=True)
        code = 127
    code = code if code >= 0 else 128 - code
    rank = os.environ.get("SLURM_PROCID", "0")
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    os.makedirs(os.path.join(logs, _FOLDER), exist_ok=True)
    exit_of_task = {"rank": int(rank), "host": host, "code": code, "time": time.time()}
    write_json(os.path.join(logs, _FOLDER, "%s.%s.json" % (role, rank)), exit_of_task)
    return code


def _ignore(number: int, frame: Any) -> None:
    pass


def forget_exits(logs: str, role: str) -> None:
    """Remove the exit codes of the tasks of a role, which is started again."""
    for name in _exits_of(logs, role):
        remove(os.path.join(logs, _FOLDER, name))


def _exits_of(logs: str, role: str) -> List[str]:
    try:
        names = os.listdir(os.path.join(logs, _FOLDER))
    except OSError:
        return []
    return [name for name in names if name.startswith(role + ".") and name.endswith(".json")]


def first_bad_task(logs: str, role: str) -> Optional[Dict[str, Any]]:
    """Return rank, host, code and time of the task of a role that ended badly first; None if none has recorded that."""
    read = [read_json(os.path.join(logs, _FOLDER, name)) for name in _exits_of(logs, role)]
    found: List[Dict[str, Any]] = [one for one in read if one]
    bad = sorted((one for one in found if one["code"]), key=lambda one: (one["time"], one["rank"]))
    return bad[0] if bad else None
