"""Fixtures: commands that end together with their test, and the models that they run on."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from megatron_rl import cli as command_line
from megatron_rl.ports import free_port
from megatron_rl.protocol.api_key import key_headers
from tests.e2e.command import Command, Result
from tests.e2e.models import make_arithmetic_model

SMALL_RUN = """\
parallel: {{tensor: 1}}
model: {{path: {model}}}
rollout: {{prompts_per_step: 8, samples_per_prompt: 16, max_prompt_tokens: 4, max_new_tokens: 2, timeout_s: 60}}
objective: {{name: drpo, delta: 0.15, advantage: grpo, norm: token_mean}}
optimizer: {{lr: 3.0e-3, updates_per_step: 2, tokens_per_microbatch: 256}}
task: {{name: arithmetic, max_operand: 2, held_out: 2}}
run: {{name: small, steps: 2, save_every: 1, seed: 3}}
"""


@pytest.fixture(scope="session")
def arithmetic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small arithmetic model."""
    return make_arithmetic_model(tmp_path_factory.mktemp("arithmetic") / "hf")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a few steps on a server that the run did not start.

    Attributes:
        folder: the run folder.
        steps: number of steps.
        versions: weight version of the server before and after the run.
        server_lives: whether the server still runs after the run.
    """

    folder: Path
    steps: int
    versions: tuple[str, str]
    server_lives: bool


@pytest.fixture(scope="session")
def finished_run(arithmetic_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of three steps, for all tests that only read it."""
    folder, steps = tmp_path_factory.mktemp("finished"), 3
    (folder / "small.yaml").write_text(SMALL_RUN.format(model=arithmetic_model), encoding="utf-8")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Command(["serve", "--model", str(arithmetic_model), "--port", str(port), "--threads", "1"], folder, {})
    arguments = ["train", "small.yaml", f"run.steps={steps}", "eval.prompts=2", f"rollout.urls=[{url}]"]
    try:
        before = server.until(lambda: version_of(url))
        command = Command(arguments, folder, {})
        try:
            result = command.wait()
        finally:
            command.end()
        assert result.code == 0, result.all
        return FinishedRun(folder / "runs" / "small", steps, (before, version_of(url)), server.process.poll() is None)
    finally:
        server.end()


def version_of(url: str, key: str | None = None) -> str:
    """Return the weight version of a server, or "" if it does not respond. `key` is its API key."""
    try:
        response = httpx.get(f"{url}/model_info", headers=key_headers(key), trust_env=False, timeout=5)
        return str(response.json()["weight_version"])
    except httpx.HTTPError:
        return ""


@pytest.fixture
def small_run(arithmetic_model: Path, tmp_path: Path) -> Path:
    """The configuration file of a run that takes seconds. The run folder is `runs/small` next to it."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_RUN.format(model=arithmetic_model), encoding="utf-8")
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The run folder of `small_run`."""
    return tmp_path / "runs" / "small"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """A function that starts a command in the test's folder. The command ends with the test."""
    started: list[Command] = []

    def start(*arguments: object, **environment: str) -> Command:
        started.append(Command([str(a) for a in arguments], tmp_path, environment))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.fixture
def cli(start: Callable[..., Command]) -> Callable[..., Result]:
    """A function that runs a command to its end and returns the result."""

    def cli(*arguments: object, **environment: str) -> Result:
        return start(*arguments, **environment).wait()

    return cli


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path) -> Callable[..., Result]:
    """A function that runs a command inside this process, so that nothing is imported again.

    The command must end before it starts another process.
    """

    def refused(*arguments: object) -> Result:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["megatron-rl", *map(str, arguments)])
        started = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, err = capfd.readouterr()
        return Result(int(ended.value.code), out, err, time.monotonic() - started)

    return refused
