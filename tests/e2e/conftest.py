"""Commands that are ended with their test, and the models they run on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
    return make_arithmetic_model(tmp_path_factory.mktemp("arithmetic") / "hf")


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
