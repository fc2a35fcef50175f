"""Bring-up: everything that a run owns is opened in order and closed in reverse order."""

import gc
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from transformers import AutoConfig

from megatron_rl.attribution.limits import check_gives_weights
from megatron_rl.config import Config
from megatron_rl.diagnostics.evaluations import EvaluationLog
from megatron_rl.diagnostics.runlog import RunLog
from megatron_rl.diagnostics.samples import SampleLog
from megatron_rl.engines.offload import OFFLOADED_NAME, OffloadedEngines
from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.own_servers import own_servers
from megatron_rl.engines.processes.revival import Revival
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.engines.registry import Registry
from megatron_rl.engines.requirements import check_server, check_server_precision
from megatron_rl.errors import ConfigError
from megatron_rl.loggers import start_loggers
from megatron_rl.plan import RunPlan, print_plan
from megatron_rl.policy.build import build_policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.parallel import Mesh, joined_mesh
from megatron_rl.policy.reference_folder import find_reference
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.protocol.api_key import key_headers, read_key
from megatron_rl.sampling.rollouts import Rollouts
from megatron_rl.supervise import STOP_SIGNALS
from megatron_rl.tasks import make_task
from megatron_rl.tasks.templates import load_tokenizer
from megatron_rl.trainer.lead import Lead
from megatron_rl.trainer.preflight import resolve_on_rank
from megatron_rl.trainer.progress import ProgressLine
from megatron_rl.trainer.provenance import write_provenance
from megatron_rl.trainer.run_control import RunControl
from megatron_rl.trainer.run_folder import holds_same_run, prepare_run_folder
from megatron_rl.trainer.stops import Stops
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.weight_sync.make_sync import make_sync


@contextmanager
def open_run(
    config: Config, *, resume: bool | None, accept_changed_code: bool = False, attribute_only: bool = False
) -> Iterator[Trainer]:
    """Open a run on this rank, and close everything it owns afterwards, also after an error. Collective.

    Args:
        config: the resolved configuration.
        resume: continue from the newest usable checkpoint of the run folder; None: if the folder holds a run.
        accept_changed_code: resume also if the user's own code has changed.
        attribute_only: the run takes no step, so the log keeps its records of later steps, and the user's own code is
            neither compared nor recorded.

    Raises:
        ConfigError: if the run folder already holds a run and `resume` is False.
        PrecisionError: if this machine does not support the precision plan.
    """
    plan = resolve_on_rank(config, attributes=attribute_only)
    with ExitStack() as stack:
        mesh = stack.enter_context(joined_mesh(config))
        noted = _note_stops(mesh)
        if mesh.rank == 0:
            print_plan(plan, config)
        resumes = _prepare_folder(config, mesh, stack, resume, accept_changed_code, attribute_only)
        control = RunControl(config.run.folder)
        stops = _watch_control(config, control, mesh, stack, attribute_only=attribute_only)
        servers = _start_servers(config, plan, mesh, stack)
        policy = build_policy(config, mesh, plan.precision, plan.noise)
        older = plan.algorithm.older_checkpoints
        guard = control.check_attempt
        checkpoints = Checkpoints(config.run.folder / "checkpoints", policy, config.run.keep, older, guard)
        stack.push(checkpoints.leave)
        if plan.algorithm.needs_reference:
            policy.keep_reference(find_reference(config, policy.source))
        offloaded = OffloadedEngines(config.run.folder / OFFLOADED_NAME)
        if mesh.rank == 0 and not config.rollout.own_servers:
            stack.push(offloaded.print_left)
        state = _load_state(config, checkpoints, mesh) if resumes else TrainState(seed=config.run.seed)
        leads: list[Lead] = []

        def open_lead() -> None:
            assert stops is not None
            stops.save_s = checkpoints.save_s
            try:
                leads.append(_open_lead(config, plan, state, servers, offloaded, stack, noted, stops, attribute_only))
            except KeyboardInterrupt:
                if not attribute_only:
                    control.write_stopped(state.step, stops.reason)
                raise

        mesh.on_lead(open_lead)
        lead = leads[0] if leads else None
        sync = make_sync(config, policy, mesh, plan.precision, None if lead is None else lead.pool)
        stack.callback(sync.close)
        stack.enter_context(_long_lived_objects())
        yield Trainer(config, plan, mesh, policy, checkpoints, sync, lead, state)


def _prepare_folder(
    config: Config, mesh: Mesh, stack: ExitStack, resume: bool | None, accept_changed_code: bool, attribute_only: bool
) -> bool:
    """Take the run folder on rank 0, and return on every rank whether the run goes on. Collective."""

    def prepare() -> bool:
        resumes = holds_same_run(config) if resume is None else resume
        accepts = accept_changed_code and (resumes or resume is not None)
        prepare_run_folder(config, stack, resume=resumes, accept_changed_code=accepts, attribute_only=attribute_only)
        return resumes

    return mesh.on_lead(prepare)


def _watch_control(
    config: Config, control: RunControl, mesh: Mesh, stack: ExitStack, *, attribute_only: bool
) -> Stops | None:
    """Begin this attempt in the control folder and watch it on rank 0. Return None on the other ranks. Collective."""
    watches: list[Stops] = []

    def watch() -> None:
        if attribute_only:
            control.check_attempt()
        else:
            control.begin()
        watches.append(Stops(control, config.run.deadline_margin_s))
        stack.callback(watches[0].close)

    mesh.on_lead(watch)
    return watches[0] if watches else None


@contextmanager
def _long_lived_objects() -> Iterator[None]:
    """Exempt every object that exists now from garbage collection.

    There are half a million. Reading an engine's response makes enough lists to start collections, and walking all
    objects each time costs ten times as much as reading.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _load_state(config: Config, checkpoints: Checkpoints, mesh: Mesh) -> TrainState:
    """Load the newest usable checkpoint into the policy, and return its state. Collective."""
    found = checkpoints.load_newest()
    if found is None and mesh.rank == 0:
        print("no usable checkpoint found: starting from the model folder", flush=True)
    return found or TrainState(seed=config.run.seed)


def _start_servers(config: Config, plan: RunPlan, mesh: Mesh, stack: ExitStack) -> Servers | None:
    """Launch this run's own engines on rank 0 first, so that they load while the policy is built. Collective.

    Returns None on the other ranks, and on every rank if `rollout.urls` or `urls_dir` names the engines.
    """
    launched: list[Servers] = []

    def launch() -> None:
        offloads = plan.algorithm.offloads_engines
        servers = own_servers(
            config,
            plan.precision,
            mesh.device.type,
            config.rollout.start_timeout_s,
            offloads=offloads,
            first_gpu=plan.placement.first_gpu,
        )
        stack.callback(servers.stop)
        launched.append(servers.launch())

    if config.rollout.own_servers:
        mesh.on_lead(launch)
    return launched[0] if launched else None


@contextmanager
def open_rollouts(
    config: Config,
    precision: PrecisionPlan,
    servers: Servers | None,
    *,
    need_logmu: bool = False,
    topk: int = 0,
    updates: bool = False,
    offloads: bool = False,
) -> Iterator[Rollouts]:
    """Open the tokenizer, the task and a pool over healthy engines. For rank 0.

    Args:
        config: the resolved configuration.
        precision: the resolved precision plan.
        servers: engines that this process launched; None: those of `rollout.urls` or `urls_dir`.
        need_logmu: engines report log-probabilities of the tokens they sample.
        topk: number of most likely tokens that engines report at every position.
        updates: this process changes the engines' weights; engines that were left paused are resumed.
        offloads: engines must be able to release their memory.
    """
    rollout = config.rollout
    registry = None if rollout.urls_dir is None else Registry(rollout.urls_dir)
    key = None if rollout.api_key_file is None else read_key(rollout.api_key_file)
    if servers is not None:
        key = servers.api_key
    tokenizer = load_tokenizer(config.model.path)
    task = make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=config.rollout.max_prompt_tokens)
    if config.eval.prompts > len(task.held_out):
        raise ConfigError(
            f"eval.prompts is {config.eval.prompts}, but the task holds out {len(task.held_out)} problems: "
            "lower it, or raise task.held_out or give a larger task.eval_data"
        )
    vocab_size = AutoConfig.from_pretrained(config.model.path).get_text_config().vocab_size
    urls, router = (rollout.urls, None) if servers is None else (servers.urls, servers.router_url)
    if registry is not None:
        urls = tuple(registry.wait(rollout.servers, rollout.start_timeout_s, key_headers(key)))
    with closing(task), EnginePool(urls, rollout.timeout_s, router, vocab_size, key, registry) as pool:

        def check(url: str) -> None:
            info = pool.info(url)
            check_server(url, info, config, updates=updates, offloads=offloads)
            check_server_precision(url, info, config.precision, dequantized=precision.dequantized)

        pool.wait_healthy(rollout.start_timeout_s, wake=updates)
        for url in pool.live_urls:
            check(url)
        pool.check, pool.patience_s = check, rollout.start_timeout_s
        with closing(Rollouts(config, task, tokenizer, pool, need_logmu, topk)) as rollouts:
            yield rollouts


def _note_stops(mesh: Mesh) -> list[int]:
    """Install handlers that only note a stop request, and return the list of noted signals.

    They stay until rank 0 works alone, in `_open_lead`. A KeyboardInterrupt between two collectives would leave the
    other ranks waiting.
    """
    noted: list[int] = []
    handler = signal.SIG_IGN if mesh.rank != 0 else lambda number, _: noted.append(number)
    _handle_stops(handler)  # rank 0 decides when every rank stops
    return noted


def _handle_stops(handler: Any) -> None:
    """Set the handler of every signal that requests a stop. nohup ignores SIGHUP, which must stay."""
    for name in STOP_SIGNALS:
        if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, handler)


def _open_lead(
    config: Config,
    plan: RunPlan,
    state: TrainState,
    servers: Servers | None,
    offloaded: OffloadedEngines,
    stack: ExitStack,
    noted: list[int],
    stops: Stops,
    attribute_only: bool,
) -> Lead:
    """Connect to the engines, read the task and open the log. For rank 0. KeyboardInterrupt if a stop was requested."""
    _handle_stops(signal.default_int_handler)
    if noted:
        raise KeyboardInterrupt
    if servers is not None:
        servers.wait_healthy()
    rollouts = stack.enter_context(
        open_rollouts(
            config,
            plan.precision,
            servers,
            need_logmu=plan.need_logmu,
            topk=plan.algorithm.topk,
            updates=True,
            offloads=plan.algorithm.offloads_engines,
        )
    )
    if servers is not None:
        stack.enter_context(closing(Revival(servers, rollouts.pool)))
    if attribute_only or config.run.attribute_every:
        for url in rollouts.pool.live_urls:
            check_gives_weights(url, rollouts.pool.info(url), config.run.folder / "attribution")
    if servers is None:
        offloaded.resume(rollouts.pool)
    else:
        offloaded.forget()  # the run's own engines ended with the process that offloaded them
    if not attribute_only and (found := rollouts.begin(state)):
        print(found, flush=True)
    resume_from = None if attribute_only else state.step
    log = stack.enter_context(RunLog(config.run.folder, resume_from, stops.control.check_attempt))
    start_loggers(config, resume_from, log)
    progress = stack.enter_context(ProgressLine(config.run.name, config.run.steps, state.step, enabled=True))
    if not attribute_only:
        write_provenance(config, plan, state.step)
    samples, evaluations = SampleLog(config.run.folder, resume_from), EvaluationLog(config.run.folder, resume_from)
    lead = Lead(rollouts, offloaded, log, samples, evaluations, progress, stops)
    _handle_stops(lead.stop_soon)
    return lead
