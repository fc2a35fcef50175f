"""`launch preflight`: look at the nodes of a cluster, in an allocation of their own that starts nothing else."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor.control_files import write_json
from megatron_rl.launch.conductor.slurm_commands import clean_environment
from megatron_rl.launch.job_folder import copy_conductor
from megatron_rl.launch.layout import JobLayout
from megatron_rl.launch.profile import load_profile
from megatron_rl.launch.render import gpu_options, group_options


def run_preflight(profile_name: str, settings: list[str], nodes: int, folder: Path | None) -> int:
    """Print what is wrong with nodes of a cluster. Return 0 if none is refused, else 1.

    Args:
        profile_name: name or file of the profile.
        settings: each `key=value` of the profile.
        nodes: number of nodes.
        folder: a folder that the nodes share; None: the first of the profile.

    Raises:
        ConfigError: no shared folder is known.
        UserError: there is no Slurm.
    """
    profile = load_profile(profile_name, settings)
    shared = folder or (profile.shared[0] if profile.shared else None)
    if shared is None:
        raise ConfigError("the profile names no shared folder: set shared, or give --folder")
    if shutil.which("salloc") is None:
        raise UserError("there is no salloc on this machine: run this on a login node")
    python = profile.python or sys.executable
    with tempfile.TemporaryDirectory(prefix="megatron-rl-preflight-", dir=shared) as place:
        run = Path(place)
        (run / "control").mkdir()
        copy_conductor(run)
        flags = gpu_options(profile.gpu_request, profile.gpus_per_node)
        role: dict[str, Any] = {"name": "any", "kind": "trainer", "group": 0, "first_node": 0, "nodes": nodes}
        role |= {"gpus": profile.gpus_per_node, "gpu_flags": flags}
        container = profile.container.model_dump(mode="json") | {"gpus": bool(profile.gpus_per_node)}
        job: dict[str, Any] = {
            "mode": "split",
            "run": place,
            "submission": "",
            "code": str(run / "code"),
            "host_python": profile.host_python,
            "versions_python": "" if profile.container.backend == "pyxis" else python,
            "ports": list(profile.ports),
            "env": profile.env,
            "container": container,
            "roles": [role],
            "preflight": {
                "scratch": str(profile.scratch),
                "min_free_gb": profile.min_free_gb,
                "min_shm_gb": profile.min_shm_gb,
            },
        }
        write_json(str(run / "job.json"), job)
        options = group_options(profile, JobLayout("split", (nodes,)), 0)
        command = ["salloc", "--quiet", *options, profile.host_python, "-E", "-s", job["code"]]
        command += ["preflight", str(run / "job.json")]
        return subprocess.run(command, env=clean_environment(os.environ), check=False).returncode
