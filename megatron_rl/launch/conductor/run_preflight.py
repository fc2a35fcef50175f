"""Preflight of a job: the probe on every node, what it finds, and the job's block of ports."""

import os
import subprocess
import time
import uuid
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from megatron_rl.launch.conductor.commands_of_steps import Filled, srun_command, step_environment, wrap_command
from megatron_rl.launch.conductor.control_files import write_json
from megatron_rl.launch.conductor.port_block import FIRST_ENGINE, block_ports, next_block, pick_block
from megatron_rl.launch.conductor.probe import Problem, find_problems, parse_facts
from megatron_rl.launch.conductor.role_processes import find_logs, last_lines, number_of
from megatron_rl.launch.conductor.run_files import RunFiles

_TIMEOUT_S, _BANDWIDTH_S, _BLOCKS = 180, 900, 3


class Preflight:
    """Looks at the nodes of a job before its roles start."""

    def __init__(
        self, job: Mapping[str, Any], groups: Sequence[Sequence[str]], files: RunFiles, say: Callable[[str], None]
    ) -> None:
        """Take the job, the hosts of each group, the run's files, and where to say what is found."""
        self._job, self._groups, self._files, self._say = job, groups, files, say
        self._engines = [role for role in job["roles"] if role["kind"] == "engine"]
        self._spares = groups[-1][len(groups[-1]) - job["rules"]["spares"] :]
        number = number_of(os.environ.get("SLURM_JOB_ID")) or os.getpid()
        self._size = FIRST_ENGINE + len(self._engines)
        self.base = pick_block(number, files.number, self._size, tuple(job["ports"]))
        self.facts: List[Dict[str, Any]] = []

    def interface_of(self, hosts: Sequence[str]) -> Dict[str, str]:
        """Return GLOO_SOCKET_IFNAME for a role on these hosts, if they agree about the interface."""
        names = {one["interface"] for one in self.facts if one["host"] in hosts}
        several = sum(len(group) for group in self._groups) > 1
        return {"GLOO_SOCKET_IFNAME": names.pop()} if several and len(names) == 1 and "" not in names else {}

    def run(self) -> Tuple[str, ...]:
        """Probe all nodes. Return those that are refused.

        If nothing is wrong but ports are in use, the next block of ports is tried.
        """
        problems: List[Problem] = []
        for _ in range(_BLOCKS):
            problems = self._probe()
            busy = [one for one in self.facts if one["busy_ports"]]
            if not busy:
                break
            self._say("ports from %d are in use on %s" % (self.base, ", ".join(one["host"] for one in busy)))
            self.base = next_block(self.base, self._size, tuple(self._job["ports"]))
        for one in problems:
            self._say("preflight: %s %s: %s" % ("refused" if one.refused else "warning", one.node, one.text))
        refused = tuple(sorted({one.node for one in problems if one.refused}))
        self._say("preflight: %d nodes, %d refused" % (sum(len(group) for group in self._groups), len(refused)))
        return refused

    def _probe(self) -> List[Problem]:
        hosts = [host for group in self._groups for host in group]
        spec = dict(self._job["preflight"], run=self._files.run, hosts=hosts, ports=self._ports())
        python = self._job["versions_python"]
        spec["versions_command"] = wrap_command(self._job["container"], [python]) if python else []
        nonce = uuid.uuid4().hex
        write_text(self._files.control("nonce"), nonce)
        for host in hosts:
            write_text(self._files.control("probe-" + host), "")
        path = os.path.join(self._files.logs, "preflight-spec.json")
        write_json(path, spec)
        before = time.time()
        output = "".join(self._run_on(number, path) for number in range(len(self._groups)))
        after = time.time()
        self.facts = parse_facts(output)
        write_json(os.path.join(self._files.logs, "preflight.json"), self.facts)
        written = [host for host in hosts if read_text(self._files.control("probe-" + host)) == host]
        limits = dict(spec, nonce=nonce, before=before, after=after, written=written, gpus=self._gpus())
        return find_problems(self.facts, limits)

    def _run_on(self, group: int, spec: str) -> str:
        hosts = self._groups[group]
        count = str(len(hosts))
        command = ["srun", "--export=ALL", "--mpi=none", "-J", "preflight", "-N", count, "-n", count, "--wait=0"]
        command += ["--het-group=%d" % group] if self._job["mode"] == "het" else []
        command += next((role["gpu_flags"] for role in self._job["roles"] if role["group"] == group), [])
        command += ["--overlap", self._job["host_python"], "-E", "-s", self._job["code"], "probe", spec]
        env = step_environment(os.environ, self._job, {"env": {}}, {})
        log = os.path.join(self._files.logs, "preflight.log")
        with open(log, "ab") as out:
            try:
                done = subprocess.run(
                    command,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=out,
                    env=env,
                    timeout=_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired as error:
                return (error.output or b"").decode("utf-8", "replace")
            out.write(done.stdout)
        return done.stdout.decode("utf-8", "replace")

    def _gpus(self) -> Dict[str, int]:
        """Return the GPUs that each host must have."""
        wanted: Dict[str, int] = {}
        for role in self._job["roles"]:
            for host in self._groups[role["group"]][role["first_node"] : role["first_node"] + role["nodes"]]:
                wanted[host] = role["gpus"]
        for host in self._spares:
            wanted[host] = self._engines[0]["gpus"]
        return wanted

    def _ports(self) -> Dict[str, List[int]]:
        """Return the ports that each host will use."""
        block = block_ports(self.base, len(self._engines))
        first = self._groups[0][0]
        found: Dict[str, List[int]] = {first: block[:2]}
        for role, port in zip(self._engines, block[2:]):
            found.setdefault(self._groups[role["group"]][role["first_node"]], []).append(port)
        found.update((host, block[2:]) for host in self._spares)
        return found


def run_bandwidth(job: Mapping[str, Any], files: RunFiles, say: Callable[[str], None]) -> int:
    """Measure bandwidth between the nodes of an allocation. Return 0, or 1 if a node is too slow or this fails.

    Args:
        job: the job, whose only role is on all nodes and has the command.
        files: the run's files.
        say: where to say what was found.
    """
    role = job["roles"][0]
    command = srun_command(job, role, Filled(files.number, files.logs, {}, {}, os.environ.get("SLURM_JOB_ID", "")))
    log = os.path.join(files.logs, role["name"] + ".srun.log")
    with open(log, "ab") as out:
        env = step_environment(os.environ, job, role, {})
        try:
            code = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, timeout=_BANDWIDTH_S
            ).returncode
        except subprocess.TimeoutExpired:
            say("bandwidth: no result after %d s" % _BANDWIDTH_S)
            code = 1
    lines = [line for path in find_logs(files.logs, role["name"]) for line in last_lines(path, 100)]
    reported = [line for line in lines if line.startswith("bandwidth: ")]
    for line in reported or lines:
        say(line)
    return 1 if code else 0


def write_text(path: str, text: str) -> None:
    """Write a small file."""
    with open(path, "w") as file:
        file.write(text)


def read_text(path: str) -> str:
    """Return the text of a small file; empty if it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
