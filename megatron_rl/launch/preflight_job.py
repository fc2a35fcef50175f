"""`launch preflight`: look at the nodes of a cluster, in an allocation of their own that starts nothing else."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor.control_files import write_json
from megatron_rl.launch.conductor.slurm_commands import clean_environment
from megatron_rl.launch.job_folder import copy_conductor, environment_of_roles
from megatron_rl.launch.layout import JobLayout, Role
from megatron_rl.launch.profile import load_profile
from megatron_rl.launch.render import gpu_options, group_options


def run_preflight(
    profile_name: str, settings: list[str], nodes: int, folder: Path | None, *, bandwidth_mb: int = 0
) -> int:
    """Print what is wrong with nodes of a cluster. Return 0 if none is refused, else 1.

    Args:
        profile_name: name or file of the profile.
        settings: each `key=value` of the profile.
        nodes: number of nodes.
        folder: a folder that the nodes share; None: the first of the profile.
        bandwidth_mb: MiB that every two nodes send to each other, to measure how fast; 0: not measured.

    Raises:
        ConfigError: no shared folder is known, or bandwidth is to be measured of one node.
        UserError: there is no Slurm.
    """
    profile = load_profile(profile_name, settings)
    shared = folder or (profile.shared[0] if profile.shared else None)
    if shared is None:
        raise ConfigError("the profile names no shared folder: set shared, or give --folder")
    if bandwidth_mb and nodes < 2:
        raise ConfigError("--bandwidth measures between nodes: give --nodes 2 or more")
    if shutil.which("salloc") is None:
        raise UserError("there is no salloc on this machine: run this on a login node")
    python = profile.python or sys.executable
    with tempfile.TemporaryDirectory(prefix="megatron-rl-preflight-", dir=shared) as place:
        run = Path(place)
        (run / "control").mkdir()
        copy_conductor(run)
        flags = gpu_options(profile.gpu_request, profile.gpus_per_node)
        role = asdict(Role("bandwidth", "trainer", 0, 0, nodes, nodes, gpus=profile.gpus_per_node, overlap=True))
        command = [python, "-m", "megatron_rl.launch.bandwidth", str(bandwidth_mb), str(profile.min_bandwidth_gb_s)]
        role |= {"gpu_flags": flags, "cpus": profile.cpus_per_task, "env": {}, "command": command}
        container = profile.container.model_dump(mode="json") | {"gpus": bool(profile.gpus_per_node)}
        job: dict[str, Any] = {
            "mode": "split",
            "run": place,
            "submission": "",
            "code": str(run / "code"),
            "host_python": profile.host_python,
            "python": python,
            "bandwidth": bool(bandwidth_mb),
            "versions_python": "" if profile.container.backend == "pyxis" else python,
            "ports": list(profile.ports),
            "env": environment_of_roles(profile),
            "container": container,
            "roles": [role],
            "rules": {"spares": 0},
            "preflight": {
                "scratch": str(profile.scratch),
                "min_free_gb": profile.min_free_gb,
                "min_shm_gb": profile.min_shm_gb,
            },
        }
        write_json(str(run / "job.json"), job)
        options = group_options(profile, JobLayout("split", (nodes,)), 0)
        salloc = ["salloc", "--quiet", *options, profile.host_python, "-E", "-s", job["code"]]
        salloc += ["preflight", str(run / "job.json")]
        return subprocess.run(salloc, env=clean_environment(os.environ), check=False).returncode
