"""Fixtures of the tests on a virtual cluster. They are skipped without root, Debian's packages or namespaces."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.tiny_model import make_tiny_model
from tests.slurm.virtual_cluster import HERE, FakeRun, VirtualCluster, cluster_at

ROOT = Path(__file__).resolve().parents[2]


def _why_not() -> str:
    """Return why this machine can hold no virtual cluster; empty if it can."""
    if os.geteuid() != 0:
        return "the virtual cluster needs root"
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        return "the virtual cluster needs Debian's packages slurmctld and slurmd"
    install = subprocess.run([HERE / "install.sh"], capture_output=True, text=True, timeout=300, check=False)
    if install.returncode:
        return f"tests/slurm/install.sh failed: {(install.stderr.strip() or 'no message').splitlines()[-1]}"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, timeout=30, check=False
    )
    return "" if probe.returncode == 0 else "the virtual cluster needs network and mount namespaces"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """A cluster of four virtual nodes for all tests."""
    reason = _why_not()
    if reason:
        pytest.skip(reason)
    # Not below pytest's folder: munged wants a place that everyone can enter.
    folder = Path(tempfile.mkdtemp(prefix="megatron-rl-cluster-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        yield from cluster_at(folder, [ROOT, tmp_path_factory.getbasetemp()])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can say sums."""
    folder = tmp_path_factory.mktemp("sums")
    make_tiny_model(folder, [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)], seed=0)
    return folder


@pytest.fixture
def fake_run(cluster: VirtualCluster, model: Path, tmp_path: Path) -> Iterator[FakeRun]:
    """A run whose roles are stand-ins. Afterwards its jobs are cancelled."""
    cluster.until_idle()  # a job of a test without a run may still end on a node, and this run would get others
    yield FakeRun(cluster, tmp_path / "runs", model)
    cluster.until_idle()
