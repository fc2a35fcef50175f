"""Preflight: facts of a node, printed as one line of JSON, and what is wrong with the facts of all nodes."""

import fcntl
import glob
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

MARK = "megatron-rl-facts "
SKEW_WARNS, SKEW_REFUSES = 1.0, 5.0  # seconds
# What ranks and engines import must be equal on all nodes.
_VERSIONS = """
import hashlib, importlib.metadata, importlib.util, json, pathlib, sys
packages = sorted({"%s==%s" % (d.metadata["Name"], d.version) for d in importlib.metadata.distributions()})
sources = hashlib.sha256()
spec = importlib.util.find_spec("megatron_rl")
for path in sorted(pathlib.Path(spec.origin).parent.rglob("*.py")):
    sources.update(path.read_bytes())
print(json.dumps({
    "python": sys.version.split()[0],
    "packages": hashlib.sha256("\\n".join(packages).encode()).hexdigest()[:16],
    "megatron_rl": sources.hexdigest()[:16],
}))
"""


class Problem(NamedTuple):
    """Something that preflight has found. A node that is refused is not used."""

    node: str
    text: str
    refused: bool


def collect(spec: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the facts of this node.

    Args:
        spec: run (folder), nonce, scratch, ports (of this node, by host), hosts, versions_command.
    """
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    facts: Dict[str, Any] = {"host": host, "time": time.time()}
    facts["free"] = {path: _free(path) for path in ("/dev/shm", spec["scratch"], spec["run"])}
    facts["gpus"] = _count_gpus()
    facts["open_files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    facts["busy_ports"] = [port for port in spec["ports"].get(host, ()) if _busy(port)]
    facts["loopback"] = [name for name in spec["hosts"] if _is_loopback(name)]
    facts["unknown_hosts"] = [name for name in spec["hosts"] if not _addresses(name)]
    facts["interface"] = _interface([name for name in spec["hosts"] if name != host])
    facts["nonce"] = _read(os.path.join(spec["run"], "control", "nonce"))
    facts["lock"] = _try_lock(os.path.join(spec["run"], "control", "probe.lock"))
    facts["writes"] = _write(os.path.join(spec["run"], "control", "probe-" + host), host)
    facts["versions"] = _versions(spec["versions_command"])
    return facts


def _free(path: str) -> Optional[float]:
    """Return free GB, or None if the folder does not exist or may not be written."""
    if not os.access(path, os.W_OK | os.X_OK):
        return None
    return shutil.disk_usage(path).free / 1e9


def _count_gpus() -> Dict[str, Optional[int]]:
    """Return the GPUs that Slurm gave to this task, and those that the driver knows; None: not known."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = glob.glob("/proc/driver/nvidia/gpus/*")
    return {
        "given": None if given is None else len([one for one in given.split(",") if one]),
        "driver": len(driver) if os.path.isdir("/proc/driver/nvidia") else None,
    }


def _busy(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _addresses(name: str) -> List[str]:
    try:
        return [str(one[4][0]) for one in socket.getaddrinfo(name, None)]
    except OSError:
        return []


def _is_loopback(name: str) -> bool:
    addresses = _addresses(name)
    return bool(addresses) and all(one.startswith("127.") or one == "::1" for one in addresses)


def _interface(peers: Sequence[str]) -> str:
    """Return the network interface towards the first peer, by its address in Linux's table; empty: not known."""
    for peer in peers[:1]:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((peer, 9))  # sends nothing
                own = probe.getsockname()[0]
                for _, name in socket.if_nameindex():
                    request = name.encode()[:15].ljust(256, b"\0")
                    try:
                        answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                    except OSError:  # an interface without an IPv4 address
                        continue
                    if socket.inet_ntoa(answer[20:24]) == own:
                        return name
        except OSError:
            return ""
    return ""


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError as error:
        return "unreadable: %s" % error


def _write(path: str, text: str) -> str:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        return str(error)
    return ""


def _try_lock(path: str) -> str:
    """Return an empty text if flock works there, else the error."""
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return str(error)
    return ""


def _versions(command: Sequence[str]) -> Dict[str, str]:
    """Return versions as the environment of the roles reports them, or the error."""
    if not command:
        return {}
    try:
        output = subprocess.check_output(
            list(command) + ["-c", _VERSIONS], stderr=subprocess.STDOUT, timeout=120, universal_newlines=True
        )
        found = json.loads(output.strip().split("\n")[-1])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        text = getattr(error, "output", None) or str(error)
        return {"error": "%s: %s" % (command[-1], text.strip().split("\n")[-1])}
    return dict(found)


def parse_facts(output: str) -> List[Dict[str, Any]]:
    """Return the facts in the output of all probes; other lines are left out."""
    lines = [line.partition(MARK)[2] for line in output.split("\n") if MARK in line]
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # a line cut by the end of a step
            continue
    return found


def find_problems(facts: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> List[Problem]:
    """Return what is wrong with the nodes of a job.

    Args:
        facts: facts of each node.
        limits: hosts, nonce, before and after (the conductor's clock around the probe), gpus (by host), min_shm_gb,
            min_free_gb, scratch, run, written (hosts whose file the conductor has read).
    """
    problems: List[Problem] = []
    replied = {one["host"] for one in facts}
    for host in limits["hosts"]:
        if host not in replied:
            problems.append(Problem(host, "did not reply to preflight: see preflight.log", True))
    for one in facts:
        problems += [Problem(one["host"], text, True) for text in _refusals(one, limits)]
        problems += [Problem(one["host"], text, False) for text in _warnings(one, limits)]
    return problems + _differences(facts)


def _refusals(one: Mapping[str, Any], limits: Mapping[str, Any]) -> List[str]:
    found = []
    skew = _skew(one, limits)
    if skew > SKEW_REFUSES:
        found.append("its clock differs by %.1f s: set it (chrony, ntp)" % skew)
    for path, least in (
        ("/dev/shm", limits["min_shm_gb"]),
        (limits["scratch"], limits["min_free_gb"]),
        (limits["run"], limits["min_free_gb"]),
    ):
        free = one["free"].get(path)
        if free is None:
            found.append("%s does not exist there or cannot be written" % path)
        elif free < least:
            found.append("%s has %.3g GB free, %.3g are required" % (path, free, least))
    wanted = limits["gpus"].get(one["host"], 0)
    counts = [count for count in one["gpus"].values() if count is not None]
    if wanted and counts and min(counts) < wanted:
        found.append("it has %d usable GPUs, %d are required" % (min(counts), wanted))
    if one["busy_ports"]:
        found.append("ports %s are in use" % ", ".join(map(str, one["busy_ports"])))
    others = [name for name in one["loopback"] if name != one["host"]]
    if others:
        found.append("it takes %s for itself: its /etc/hosts gives a loopback address" % ", ".join(others))
    if one["unknown_hosts"]:
        found.append("it cannot resolve %s" % ", ".join(one["unknown_hosts"]))
    if one["nonce"] != limits["nonce"] or (not one["writes"] and one["host"] not in limits["written"]):
        found.append("the run folder %s is not shared with it" % limits["run"])
    elif one["writes"]:
        found.append("it cannot write the run folder (%s)" % one["writes"])
    if "error" in one["versions"]:
        found.append("its Python does not run (%s)" % one["versions"]["error"])
    return found


def _warnings(one: Mapping[str, Any], limits: Mapping[str, Any]) -> List[str]:
    found = []
    if SKEW_WARNS < _skew(one, limits) <= SKEW_REFUSES:
        found.append("its clock differs by %.1f s" % _skew(one, limits))
    if one["host"] in one["loopback"]:
        found.append("its /etc/hosts gives its own name a loopback address; gloo is told to use %s" % one["interface"])
    if one["lock"]:
        found.append("files of the run folder cannot be locked there (%s)" % one["lock"])
    if one["open_files"] < 4096:
        found.append("it allows %d open files; large runs need 4096" % one["open_files"])
    return found


def _skew(one: Mapping[str, Any], limits: Mapping[str, Any]) -> float:
    return max(0.0, one["time"] - limits["after"], limits["before"] - one["time"])


def _differences(facts: Sequence[Mapping[str, Any]]) -> List[Problem]:
    """Name the nodes whose versions differ from those of most nodes; of two groups of equal size, the second."""
    problems = []
    for key in ("python", "packages", "megatron_rl"):
        values = [one["versions"][key] for one in facts if key in one["versions"]]
        if len(set(values)) < 2:
            continue
        usual = max(values, key=lambda value: (values.count(value), -values.index(value)))
        for one in facts:
            if one["versions"].get(key, usual) != usual:
                text = "its %s differs from that of most nodes (%s, not %s)" % (key, one["versions"][key], usual)
                problems.append(Problem(one["host"], text, True))
    return problems


def run_probe(path: str) -> None:
    """Print the facts of this node for the spec in a file."""
    with open(path) as file:
        spec = json.load(file)
    sys.stdout.write(re.sub(r"\n", " ", MARK + json.dumps(collect(spec))) + "\n")
    sys.stdout.flush()
