"""A run says what computed it."""

import subprocess

from megatron_rl.config import make_config
from megatron_rl.trainer.provenance import git_revision, package_versions


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_revision_is_the_commit_and_says_that_files_changed(tmp_path):
    assert git_revision(tmp_path).startswith("no checkout; version ")
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first", "--no-verify")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == f"{commit} dirty"


def test_the_version_of_sglang_is_that_of_the_servers_environment(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"sglang": "0.5.99"}\'\n')
    python.chmod(0o755)
    rollout = {"engine": "sglang", "sglang": {"python": str(python)}}
    config = make_config({"model": {"path": "m"}, "rollout": rollout})
    assert package_versions(config)["sglang"] == "0.5.99"
    given = make_config({"model": {"path": "m"}, "rollout": rollout | {"urls": ["http://a"]}})
    assert "sglang" not in package_versions(given) and "torch" in package_versions(given)
