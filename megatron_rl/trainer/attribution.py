"""Attribution inside a run, every so many steps, and of a run's folder once it has ended or stopped."""

from rich.console import Console
from torch import Tensor

from megatron_rl.attribution.attribute import Attribution, Probe, attribute, draw_probe
from megatron_rl.config import Config
from megatron_rl.errors import EngineError, UserError
from megatron_rl.tasks import prompts_for_step
from megatron_rl.trainer.bringup import Run, open_run

PROMPTS = 16
_SEED = 104_729  # apart from the seeds of training and evaluation


def weights_if_due(run: Run) -> list[Tensor] | None:
    """A copy of the weights that sample the step at hand, if it ends with an attribution. Collective."""
    every = run.config.run.attribute_every
    return run.policy.copy_weights() if every and (run.state.step + 1) % every == 0 else None


def attribute_step(run: Run, sampled: list[Tensor]) -> Attribution | None:
    """After a step's updates and before they are published: engines still hold `sampled`. Collective.

    None when an engine failed on the way: those that are dead are dropped, and training goes on with the others.
    """
    try:
        found = _attribute(run, PROMPTS, sampled=sampled)
    except EngineError as error:  # raised on every rank alike: rank 0 speaks to the engines and tells the others
        left = run.mesh.on_lead(lambda: _still_live(run))
        run.say(f"mismatch after {run.state.step + 1} steps not attributed, {left} engine(s) left: {error}")
        return None
    run.say(f"mismatch after {run.state.step + 1} steps: {'; '.join(found.verdict)}")
    return found


def attribute_run(config: Config, *, prompts: int, layers: bool, sampled_by: int | None) -> None:
    """Attribute the mismatch of a run's newest checkpoint, print it, and append it to the run's log. Collective.

    The engines are started, or updated where rollout.urls names them, and serve that checkpoint, or with `sampled_by` the
    one after so many steps: then the steps since are the staleness. Raises CheckpointError when it was not kept.
    """
    with open_run(config, resume=True, attribute_only=True) as run:
        sampled, by = None, run.state.step if sampled_by is None else sampled_by
        if sampled_by is not None:
            if sampled_by > run.state.step:
                raise UserError(f"--sampled-by {sampled_by} lies after the newest checkpoint, of step {run.state.step}")
            newest = run.policy.copy_weights()
            run.checkpoints.load_weights(sampled_by)
            run.publish(run.state.version)
            sampled = run.policy.copy_weights()
            run.policy.put_weights(newest)
        else:
            run.publish(run.state.version)
        found = _attribute(run, prompts, sampled=sampled, layers=layers)
        if run.mesh.rank == 0:
            run.log.append(found.record(run.state.step, by))
            console = Console()
            console.print(found.table(by))
            for sentence in found.verdict:
                console.print(sentence, highlight=False, soft_wrap=True)


def _still_live(run: Run) -> int:
    run.pool.drop_dead()
    return len(run.pool.live_urls)


def _attribute(run: Run, prompts: int, *, sampled: list[Tensor] | None, layers: bool = False) -> Attribution:
    def draw() -> Probe:
        serving = [url for url in run.pool.live_urls if url not in run.pool.held]
        if not serving:
            raise EngineError(
                f"no engine serves weight version {run.state.version}, so none can be looked at: {run.pool.held}"
            )
        asked = prompts_for_step(run.rollouts.task, run.state.step, prompts, run.config.run.seed + _SEED)
        return draw_probe(
            serving[0],
            asked,
            run.config.rollout,
            stop_token_ids=run.rollouts.stop,
            seed=run.config.run.seed + _SEED + run.state.step,
            version=run.state.version,
        )

    probe = run.mesh.on_lead(draw)
    pool = run.pool if run.mesh.rank == 0 else None
    folder = run.config.run.folder / "attribution"
    return attribute(run.policy, run.precision, pool, probe, folder, sampled=sampled, layers=layers)
