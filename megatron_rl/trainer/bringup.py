"""One run: its ranks, policy, engines, task, log and checkpoints, brought up in order and taken down in reverse."""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_rl.algorithms.erpd.settings import ERPDPlan, make_run_objective, plan_of
from megatron_rl.attribution.replay import check_gives_weights
from megatron_rl.claim import claim
from megatron_rl.config import Config, changed_keys, load_config
from megatron_rl.diagnostics.runlog import RunLog
from megatron_rl.engines.offload import RestingEngines
from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.own_servers import check_named, own_servers
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.objectives import Objective
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.parallel import Mesh
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.sampling.rollouts import Rollouts, rollouts_folder
from megatron_rl.server.quantized_linear import check_precision
from megatron_rl.tasks import make_task
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.precision_check import say
from megatron_rl.trainer.preflight import check_rank, check_run_folder
from megatron_rl.trainer.progress import ProgressLine
from megatron_rl.types import Batch
from megatron_rl.weight_sync.make_sync import make_sync
from megatron_rl.weight_sync.sync import WeightSync

START_TIMEOUT_S = 300.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Run:
    """What the loop works with. Rank 0 alone holds engines, task and log; every rank holds the policy."""

    rollouts: Rollouts
    pool: EnginePool
    sync: WeightSync
    log: RunLog
    progress: ProgressLine

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        policy: Policy,
        objective: Objective,
        precision: PrecisionPlan,
        plan: ERPDPlan | None = None,
    ) -> None:
        self.config, self.mesh, self.policy, self.objective, self.plan = config, mesh, policy, objective, plan
        assert objective.norm is not None  # filled in by the objective itself
        self.norm = objective.norm
        self.precision = precision
        pinned = plan.older_students if plan else ()
        self.checkpoints = Checkpoints(config.run.folder / "checkpoints", policy, config.run.keep, pinned)
        self.resting = RestingEngines(config.run.folder / "engines_released.json")
        self.state = TrainState(seed=config.run.seed)
        self.at_step = True  # the policy holds the weights of `state.step`, not those of a stage on the way to the next
        self.interrupted = self.warned = False

    def collect(self, step: int, watch: Stopwatch) -> Batch:
        """Rank 0: the batch of a step. Raises KeyboardInterrupt when a stop was asked for."""
        if self.interrupted:
            raise KeyboardInterrupt
        return self.rollouts.collect(step, self.state.version, watch)

    def settle(self) -> None:
        """Before the weights change: a deterministic run waits for what the old ones may sample. Collective."""
        self.mesh.on_lead(lambda: self.rollouts.settle())  # noqa: PLW0108  (rank 0 alone has rollouts)

    def publish(self, version: int) -> None:
        """Put the policy's weights on every engine as `version`, verified, or raise EngineError. Collective.

        An update that lost an engine on the way is made again with those that are left; so is, once, one after which an engine
        holds some of both versions, which only a whole update mends. Engines that were lost before and answer again take
        part.
        """
        self.mesh.on_lead(self.sync.readmit)
        mended = False
        while True:
            before = self.mesh.on_lead(lambda: self.pool.live_urls)
            try:
                self.sync.push(self.policy.export(self.precision), version)
                return
            except EngineError as error:
                left, held = self.mesh.on_lead(lambda: (self.pool.live_urls, self.pool.held))
                if not left:
                    lost = self.mesh.on_lead(lambda: self.pool.lost)
                    reasons = "; ".join(f"{url}: {reason}" for url, reason in lost.items())
                    self.mesh.raise_everywhere(EngineError(f"{error}; engines lost so far: {reasons}"))
                mends = bool(held) and not mended
                if len(left) == len(before) and not mends:
                    raise
                mended = mended or len(left) == len(before)
                if self.mesh.rank == 0:
                    print(f"weight update repeated with {len(left)} of {len(before)} engines: {error}", flush=True)

    def advance(self, step: int, version: int) -> None:
        """A step is done; a checkpoint whose files are on disk by now is completed. Collective."""
        self.checkpoints.finish(wait=False)
        below, ahead = self.mesh.on_lead(lambda: self.rollouts.drawn)
        updates = self.policy.optimizer.updates
        self.state = replace(self.state, step=step, version=version, updates=updates, drawn=below, drawn_ahead=ahead)
        self.at_step = True

    def record(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        if record["kind"] == "step":
            self.progress.step(record)

    def say(self, text: str) -> None:
        """A line that stays, from rank 0."""
        if self.mesh.rank == 0:
            self.progress.note(text)

    def warn_once(self, text: str | None) -> None:
        """Say a warning, None being none, if it is the run's first. On rank 0."""
        if text is not None and not self.warned:
            self.warned = True
            self.say(f"warning: {text}")

    def evaluate(self) -> None:
        """Held-out pass rates of the current weights, logged. Collective; nothing when `eval.prompts` is 0."""
        if self.config.eval.prompts == 0:
            return
        rates = self.mesh.on_lead(lambda: self.rollouts.evaluate(self.state.step))
        if self.mesh.rank == 0:
            self.log.append({"kind": "eval", "step": self.state.step, "version": self.state.version, **rates})
            text = ", ".join(f"{name.removeprefix('eval/')} {rate:.1%}" for name, rate in rates.items())
            self.progress.note(f"held-out pass rate after {self.state.step} steps: {text}")

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0: at the end only) is to be done after `step` steps."""
        return step == self.config.run.steps or bool(every and step % every == 0)

    def save(self, *, wait: bool) -> None:
        """A checkpoint of the last whole step. Nothing inside a stage: that checkpoint is complete by then. Collective."""
        if self.at_step:
            self.checkpoints.save(self.state, wait=wait)

    def ensure_saved(self) -> None:
        """Return once the checkpoint of this step is complete on disk. Collective."""
        self.checkpoints.finish(wait=True)
        if not self.checkpoints.has(self.state.step):
            self.save(wait=True)

    def rest_engines(self) -> None:
        """Have the engines give their memory back until `wake_engines` and the next publish. Collective."""
        self.mesh.on_lead(lambda: self.resting.rest(self.pool))

    def wake_engines(self) -> None:
        self.mesh.on_lead(lambda: self.resting.wake(self.pool))

    def name_resting(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """At the end of a run that did not come to its own: say which engines of somebody else's it leaves resting."""
        if kind is None or self.mesh.rank != 0 or not self.config.rollout.urls or not self.resting.urls:
            return
        urls = ", ".join(self.resting.urls)
        print(
            f"engines left without their memory: {urls}; --resume of this run wakes them", file=sys.stderr, flush=True
        )

    def export(self) -> None:
        """Write the policy as a complete Hugging Face folder, `hf/` in the run folder. Collective."""
        self.policy.save_hf(self.config.run.folder / "hf")

    def stop_soon(self, *_: object) -> None:
        """Signal handler of rank 0: end at the next safe point; a running generation is called off."""
        self.interrupted = True
        self.pool.interrupt()


@contextmanager
def open_run(config: Config, *, resume: bool, attribute_only: bool = False) -> Iterator[Run]:
    """Bring a run up on this rank; everything it owns is gone afterwards, whatever happened.

    attribute_only: it takes no step; otherwise those after the newest checkpoint are run again, and leave the log. Raises
    ConfigError when the run folder already holds a run and `resume` is False, PrecisionError for a plan that cannot run here.
    """
    report = check_rank(config, attributes=attribute_only or config.run.attribute_every > 0)
    plan, objective = plan_of(config), make_run_objective(config)
    device = pick_device(config.run.device)
    torch.set_num_threads(1 if device.type == "cpu" and config.parallel.world_size > 1 else torch.get_num_threads())
    mesh = parallel.initialize(config.parallel, device, config.run.seed)
    with ExitStack() as stack:
        stack.callback(parallel.shutdown)
        stops = _note_stops(mesh)
        if mesh.rank == 0:
            say(report)
        mesh.on_lead(lambda: _prepare_folder(config, resume, stack))
        servers = _start_servers(config, report.plan, mesh, stack)
        policy = Policy(config, mesh)
        run = Run(config, mesh, policy, objective, report.plan, plan)
        if "logref" in (objective.needs if plan is None else objective.needs | plan.teacher_objective().needs):
            policy.keep_reference()
        stack.push(run.checkpoints.leave)
        stack.push(run.name_resting)
        if resume:
            found = run.checkpoints.load_newest()
            if found is None and mesh.rank == 0:
                print("no usable checkpoint found: starting from the model folder", flush=True)
            run.state = found or run.state
        mesh.on_lead(lambda: _open_lead(run, servers, stack, stops, attribute_only))
        run.sync = make_sync(config, policy, mesh, run.precision, run.pool if mesh.rank == 0 else None)
        stack.callback(run.sync.close)
        yield run


def _prepare_folder(config: Config, resume: bool, stack: ExitStack) -> None:
    check_run_folder(config, resume=resume)
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = claim(folder / "in-use")
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error}): see to it that no other process works there", flush=True)
    else:
        if lock is None:
            raise ConfigError(
                f"{folder} is in use by another process: wait for it or end it, or choose another run.name"
            )
        stack.enter_context(lock)
    if not resume:
        shutil.rmtree(rollouts_folder(config), ignore_errors=True)
    resolved = folder / "config.yaml"
    if resume and resolved.is_file():
        changed = changed_keys(load_config(resolved), config)
        if changed:
            print(f"resuming with other settings than the run had so far: {', '.join(changed)}", flush=True)
    resolved.write_text(config.dump(), encoding="utf-8")


def _start_servers(config: Config, plan: PrecisionPlan, mesh: Mesh, stack: ExitStack) -> Servers | None:
    """Launch our own engines first, on rank 0, so that they load while the policy is built. None elsewhere. Collective."""
    launched: list[Servers] = []

    def launch() -> None:
        servers = own_servers(config, plan, mesh.device.type, START_TIMEOUT_S)
        stack.callback(servers.stop)
        launched.append(servers.launch())

    if not config.rollout.urls:
        mesh.on_lead(launch)
    return launched[0] if launched else None


@contextmanager
def open_rollouts(
    config: Config,
    plan: PrecisionPlan,
    servers: Servers | None,
    *,
    need_logmu: bool,
    topk: int = 0,
    updates: bool = False,
) -> Iterator[Rollouts]:
    """Tokenizer, task and a pool over healthy engines: `servers`, or those of rollout.urls.

    updates: their weights are this process's to change; those that somebody left paused go on.
    """
    urls, router = (config.rollout.urls, None) if servers is None else (servers.urls, servers.router_url)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    task = make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=config.rollout.max_prompt_tokens)
    if config.eval.prompts > len(task.held_out):
        raise ConfigError(
            f"eval.prompts is {config.eval.prompts}, but the task holds out {len(task.held_out)} problems: "
            "lower it, or raise task.held_out or give a larger task.eval_data"
        )
    with closing(task), EnginePool(urls, config.rollout.timeout_s, router) as pool:
        pool.wait_healthy(START_TIMEOUT_S, wake=updates)
        for url in pool.live_urls:
            info = pool.info(url)
            check_named(url, info, config, updates=updates)
            check_precision(url, info, config.precision, dequantized=plan.dequantized)
        yield Rollouts(config, task, tokenizer, pool, need_logmu, topk)


def _note_stops(mesh: Mesh) -> list[int]:
    """Until rank 0 works alone, a stop is only noted: raised between two collectives it would strand the other ranks."""
    noted: list[int] = []
    if mesh.rank != 0:
        for name in STOP_SIGNALS:  # rank 0 decides when all stop
            signal.signal(name, signal.SIG_IGN)
        return noted
    for name in STOP_SIGNALS:
        signal.signal(name, lambda number, _: noted.append(number))
    return noted


def _open_lead(run: Run, servers: Servers | None, stack: ExitStack, stops: list[int], attribute_only: bool) -> None:
    """Rank 0: connect to the engines, read the task, open the log. KeyboardInterrupt when a stop was asked for."""
    config = run.config
    for name in STOP_SIGNALS:
        signal.signal(name, signal.default_int_handler)
    if stops:
        raise KeyboardInterrupt
    if servers is not None:
        servers.wait_healthy()
    needs = run.objective.needs
    topk = run.objective.top_k if "topk" in needs else 0  # type: ignore[attr-defined]
    need_logmu = "logmu" in needs or config.rollout.record_logmu
    run.rollouts = stack.enter_context(
        open_rollouts(config, run.precision, servers, need_logmu=need_logmu, topk=topk, updates=True)
    )
    run.pool = run.rollouts.pool
    if attribute_only or config.run.attribute_every:
        for url in run.pool.live_urls:
            check_gives_weights(url, run.pool.info(url))
    if servers is None:
        run.resting.wake(run.pool)
    else:
        run.resting.forget()  # engines of ours ended with the run that rested them
    if not attribute_only and (found := run.rollouts.begin(run.state)):
        print(found, flush=True)
    run.log = stack.enter_context(RunLog(config.run.folder, resume_from=None if attribute_only else run.state.step))
    run.progress = stack.enter_context(ProgressLine(config.run.name, config.run.steps, run.state.step, enabled=True))
    for name in STOP_SIGNALS:
        signal.signal(name, run.stop_soon)
