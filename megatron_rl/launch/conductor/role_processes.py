"""The processes of the roles: steps started by srun, or processes of this machine."""

import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any, Dict, List, Mapping, Optional

from megatron_rl.launch.conductor.commands_of_steps import Filled, fill_words, srun_command, step_environment
from megatron_rl.launch.conductor.slurm_commands import call_slurm, steps_of_job


class RoleProcesses:
    """Starts, watches and ends the roles of an attempt."""

    def __init__(self, job: Mapping[str, Any], key: str) -> None:
        """Take the job, and the name by which Slurm knows it; empty: roles run on this machine."""
        self._job, self._key = job, key
        self._processes: Dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: Mapping[str, Any], filled: Filled, own: Mapping[str, str]) -> None:
        """Start a role. Its output is appended to files of the attempt's folder."""
        name = role["name"]
        if self._key:
            command, log = srun_command(self._job, role, filled), os.path.join(filled.logs, name + ".srun.log")
        else:
            command, log = fill_words(role["command"], name, filled), os.path.join(filled.logs, name + ".log")
        env = step_environment(os.environ, self._job, role, own)
        with open(log, "ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out if self._key else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self._processes[name] = process
        if process.stdout is not None:
            threading.Thread(target=_copy_output, args=(process.stdout, log), daemon=True).start()

    def ended(self) -> Dict[str, int]:
        """Return the exit codes of roles that have ended since the last call; 128 + n for signal n."""
        found = {}
        for name, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[name]
                found[name] = code if code >= 0 else 128 - code
        return found

    def term(self, name: str) -> None:
        """Ask a role to end. srun itself gets no signal: it would kill its tasks at once."""
        self._signal(name, signal.SIGTERM)

    def kill(self, name: str) -> None:
        """Kill a role, with everything that it has started."""
        self._signal(name, signal.SIGKILL)

    def _signal(self, name: str, number: int) -> None:
        process = self._processes.get(name)
        if process is None:
            return
        if self._key:
            step = steps_of_job(self._key).get(name)
            # For a step on a part of the nodes, scancel says "Invalid job id" and delivers: only the process tells.
            if step is not None:
                call_slurm(["scancel", "--signal=" + signal.Signals(number).name[3:], step])
            if step is not None and number != signal.SIGKILL:
                return
        self._signal_process(process, number)

    def _signal_process(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        try:
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        except OSError:  # it has ended meanwhile
            pass


def _copy_output(source: IO[bytes], log: str) -> None:
    """Copy the output of a role on this machine to its log and to the terminal, until it ends."""
    with open(log, "ab") as out:
        for line in iter(source.readline, b""):
            out.write(line)
            out.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.flush()


def find_logs(folder: str, role: str) -> List[str]:
    """Return the log files of a role in an attempt's folder, those of tasks before srun's own."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    own = [name for name in names if name.startswith(role + "-") or name == role + ".log"]
    return [os.path.join(folder, name) for name in own + [name for name in names if name == role + ".srun.log"]]


def last_lines(path: str, count: int) -> List[str]:
    """Return the last lines of a file; [] if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 200 * count))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.rstrip("\n").split("\n")[-count:] if text.strip() else []


def number_of(value: Optional[str]) -> int:
    """Return the number at the start of a job's name, such as 12 of `12_3`; 0 without one."""
    digits = (value or "").split("_")[0].split("+")[0]
    return int(digits) if digits.isdecimal() else 0
