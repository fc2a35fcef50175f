"""Hand-overs of three walks through the package, counted by tracing one real run.

The walks: a prompt to the loss of a micro-batch; a weight from `Policy.export` to the confirmation of an engine; a
Hugging Face folder to the loaded parameters. Trainer and embedded engine run in this process, over HTTP and the disk
transport, so that one profile function sees both sides.

The rule. A hand-over is a call of a function in one file of the package by a function in another file. The caller is
the nearest function of the package on the stack, so calls through torch, megatron-core, asyncio and transformers count.
A nested function, a lambda or a comprehension counts as the function around it. Each pair (caller, callee) counts once.
Properties and special methods count; the `__init__` that a dataclass generates is in no file and does not. A function
that starts a thread, an asyncio task or an HTTP response has no caller on its stack. It is counted apart, as an entry.
The walk stands for the code that makes its calls in a run (`trainer/loop.py`, `policy/build.py`): its own calls count,
but it is no file of the package. Prints a table.

    python benchmarks/walks.py [--list]
"""

import argparse
import inspect
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from models import build_planned_chunks

import megatron_rl
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.config import make_config
from megatron_rl.server.app import create_app
from megatron_rl.server.engine import Engine
from megatron_rl.tiny_model import make_tiny_model
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import load_weights

PROMPT, WEIGHT, FOLDER = "prompt to loss", "weight to engine", "folder to parameter"


@dataclass
class Walk:
    """The hand-overs of one walk.

    Attributes:
        pairs: (caller, callee), each as `file:function`, in order of first appearance.
        entries: functions that were called without a caller of the package on the stack.
    """

    pairs: dict[tuple[str, str], None] = field(default_factory=dict)
    entries: dict[str, None] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """The files of the package that take part in a hand-over."""
        return {file_of(name) for pair in self.pairs for name in pair} - {"walk"}


class Tracer:
    """Records walks. It sees the calling thread, and threads that were started after it was made."""

    def __init__(self) -> None:
        self.walks = {name: Walk() for name in (PROMPT, WEIGHT, FOLDER)}
        self._now: Walk | None = None
        self._names: dict[CodeType, str] = {}
        self._package = Path(megatron_rl.__file__).parent
        threading.setprofile(self._profile)

    @contextmanager
    def walk(self, name: str) -> Iterator[None]:
        """Record what is called inside, until `stop`, as a part of the walk `name`."""
        self._now = self.walks[name]
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Record nothing more. For a walk that ends inside a call."""
        sys.setprofile(None)
        self._now = None

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        walk = self._now
        if walk is None or event != "call":
            return
        callee, caller, back = self._name(frame.f_code), "", frame.f_back
        if not callee:
            return
        while back is not None and not (caller := self._name(back.f_code)):
            back = back.f_back
        if not caller:
            walk.entries.setdefault(callee)
        elif file_of(caller) != file_of(callee):
            walk.pairs.setdefault((caller, callee))

    def _name(self, code: CodeType) -> str:
        """Return `file:function` of a function of the package or of a walk, "" of other code and of a module's body."""
        if code not in self._names:
            self._names[code] = self._named(code)
        return self._names[code]

    def _named(self, code: CodeType) -> str:
        file, function = Path(code.co_filename), code.co_qualname.partition(".<locals>")[0]
        if file.is_relative_to(self._package):
            return f"{file.relative_to(self._package)}:{function}" if code.co_flags & inspect.CO_NEWLOCALS else ""
        return f"walk:{function}" if function.startswith("walk_") else ""


def file_of(name: str) -> str:
    """Return the file of `file:function`."""
    return name.partition(":")[0]


class UntilLoss:
    """An objective that stops the tracer once the loss of a micro-batch is computed."""

    def __init__(self, objective: Any, tracer: Tracer) -> None:
        self._objective, self._tracer = objective, tracer

    def __call__(self, inputs: Any) -> Any:
        out = self._objective(inputs)
        self._tracer.stop()
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app in a thread of this process and yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def settings(model: Path, folder: Path, url: str) -> dict[str, Any]:
    """Return the configuration of a run with one prompt for each step.

    Args:
        model: the model folder.
        folder: where the run folder and the weight versions are written. The default place of weight versions is not
            used: a transport also checks what killed runs of this machine left there.
        url: the engine.
    """
    lengths = {"max_prompt_tokens": 32, "max_new_tokens": 8}
    place = {"urls": [url], "weights_dir": str(folder / "weights")}
    return {
        "model": {"path": str(model)},
        "rollout": {**place, "prompts_per_step": 1, "samples_per_prompt": 2, **lengths},
        "optimizer": {"updates_per_step": 1, "tokens_per_microbatch": 128},
        "run": {"dir": str(folder), "device": "cpu"},
    }


def walk_prompt_to_loss(tracer: Tracer, trainer: Trainer) -> None:
    """Collect a batch of one prompt and learn from it, as `trainer.loop.train` does."""
    algorithm, watch = PolicyGradient(UntilLoss(trainer.plan.algorithm.objective, tracer)), Stopwatch()  # type: ignore[arg-type]
    with tracer.walk(PROMPT):
        algorithm.learn(trainer, algorithm.collect(trainer, watch), watch)


def walk_weight_to_engine(tracer: Tracer, trainer: Trainer) -> None:
    """Publish the first weight version, as `trainer.loop.train` does."""
    with tracer.walk(WEIGHT):
        trainer.publish(trainer.state.version)


def walk_folder_to_parameter(tracer: Tracer, trainer: Trainer) -> None:
    """Load a folder into a model, as `policy.build.build_policy` does. Building the model itself is not traced."""
    mesh, config = trainer.mesh, trainer.config
    with tracer.walk(FOLDER):
        sizes = {"tensor_parallel": mesh.tp_size, "expert_parallel": config.parallel.expert}
        source = check_folder(HFFolder(config.model.path), **sizes)
    models = build_planned_chunks(config, source.shape, mesh)
    with tracer.walk(FOLDER):
        load_weights(models, source, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)


def show(walks: dict[str, Walk], *, pairs: bool) -> None:
    """Print the table, and with `pairs` every hand-over in order of first appearance."""
    print(f"{'walk':<22}{'hand-overs':>12}{'files':>8}{'entries':>10}")
    for name, walk in walks.items():
        print(f"{name:<22}{len(walk.pairs):>12}{len(walk.files):>8}{len(walk.entries):>10}")
    for name, walk in walks.items() if pairs else ():
        print(f"\n{name}")
        for number, (caller, callee) in enumerate(walk.pairs, 1):
            print(f"{number:>4}  {caller} -> {callee}")
        print("".join(f"      entry: {entry}\n" for entry in walk.entries), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the hand-overs")
    args = parser.parse_args()
    tracer = Tracer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model", [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)], seed=0)
        app = create_app(Engine(model, threads=1).start())
        with serving(app) as url, open_run(make_config(settings(model, folder, url)), resume=False) as trainer:
            walk_weight_to_engine(tracer, trainer)
            walk_prompt_to_loss(tracer, trainer)
            walk_folder_to_parameter(tracer, trainer)
    show(tracer.walks, pairs=args.list)


if __name__ == "__main__":
    main()
