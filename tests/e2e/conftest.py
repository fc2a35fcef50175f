"""Commands that are ended with their test, and the models they run on."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from megatron_rl import cli as command_line
from tests.e2e.command import RANK_VARIABLES, Command, Result
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
    return make_arithmetic_model(tmp_path_factory.mktemp("arithmetic") / "hf")


@dataclass(frozen=True)
class FinishedRun:
    """A run of a few steps on a server that somebody else had started, and what became of that server.

    versions: the server's weight version before and after.
    """

    folder: Path
    steps: int
    versions: tuple[str, str]
    server_lives: bool


@pytest.fixture(scope="session")
def finished_run(arithmetic_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder, steps = tmp_path_factory.mktemp("finished"), 3
    (folder / "small.yaml").write_text(SMALL_RUN.format(model=arithmetic_model), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def version_of(url: str) -> str:
    """The weight version of a server, "" while it does not answer."""
    try:
        return str(httpx.get(f"{url}/model_info", trust_env=False, timeout=5).json()["weight_version"])
    except httpx.HTTPError:
        return ""


@pytest.fixture
def small_run(arithmetic_model: Path, tmp_path: Path) -> Path:
    """A configuration file of a run of seconds; the run's folder is `runs/small` beside it."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_RUN.format(model=arithmetic_model), encoding="utf-8")
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "small"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts a command in the test's folder."""
    started: list[Command] = []

    def start(*arguments: object, **environment: str) -> Command:
        started.append(Command([str(a) for a in arguments], tmp_path, environment))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.fixture
def cli(start: Callable[..., Command]) -> Callable[..., Result]:
    """Runs a command to its end."""

    def cli(*arguments: object, **environment: str) -> Result:
        return start(*arguments, **environment).wait()

    return cli


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path) -> Callable[..., Result]:
    """Runs a command inside this process, where nothing has to be imported again: it ends before it starts another."""

    def refused(*arguments: object) -> Result:
        monkeypatch.chdir(tmp_path)
        for name in RANK_VARIABLES:  # of a world that this process was a rank of
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["megatron-rl", *map(str, arguments)])
        started = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, err = capfd.readouterr()
        return Result(int(ended.value.code), out, err, time.monotonic() - started)

    return refused
