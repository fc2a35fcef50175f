"""Attribution of the mismatch, inside a run every few steps or from the folder of a run that has ended."""

from typing import Any

from rich.console import Console
from torch import Tensor

from megatron_rl.attribution.attribute import Attribution, AttributionProbe, attribute, draw_probe
from megatron_rl.config import Config
from megatron_rl.errors import EngineError, UserError
from megatron_rl.tasks import prompts_for_step
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.lead import Lead
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.trainer import Trainer

PROMPTS = 16
_SEED = 104_729  # differs from the seeds of training and evaluation


class AttributionHook:
    """Hook that attributes the mismatch inside a run, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._sampled: list[Tensor] | None = None

    def before_step(self, trainer: Trainer) -> None:
        """Copy the weights that sample the step if an attribution is due after it."""
        due = (trainer.state.step + 1) % self.every == 0
        self._sampled = trainer.policy.copy_weights() if due else None

    def before_publish(self, trainer: Trainer, watch: Stopwatch) -> list[dict[str, Any]]:
        """Return the record of the attribution. The list is empty if none is due or an engine failed."""
        if self._sampled is None:
            return []
        with watch("attribution"):
            found = attribute_step(trainer, self._sampled)
        step = trainer.state.step
        return [] if found is None else [found.record(step + 1, sampled_by=step)]


def attribution_hooks(config: Config) -> list[AttributionHook]:
    """Return the attribution hook if `run.attribute_every` is set, else an empty list."""
    every = config.run.attribute_every
    return [AttributionHook(every)] if every else []


def attribute_step(trainer: Trainer, sampled: list[Tensor]) -> Attribution | None:
    """Attribute the mismatch after a step's updates, while engines still hold the weights `sampled`. Collective.

    Returns None if an engine failed. Engines that are not healthy are then lost. Training continues with the others.
    """
    try:
        found = _attribute(trainer, PROMPTS, sampled=sampled)
    except EngineError as error:  # only rank 0 sends requests; every rank raises the same error
        left = trainer.on_lead(_find_lost)
        trainer.print_line(
            f"mismatch after {trainer.state.step + 1} steps not attributed, {left} engine(s) left: {error}"
        )
        return None
    trainer.print_line(f"mismatch after {trainer.state.step + 1} steps: {'; '.join(found.verdict)}")
    return found


def attribute_run(config: Config, *, prompts: int, layers: bool, sampled_by: int | None) -> None:
    """Attribute the mismatch of a run's newest checkpoint, print it, and append it to the run's log. Collective.

    Args:
        config: configuration of the run. Engines are started, or updated if `rollout.urls` names them.
        prompts: number of responses to score, one per prompt.
        layers: also compare hidden states layer by layer; on one rank only.
        sampled_by: step of the kept checkpoint whose weights sample; None: the newest checkpoint. The steps after it
            are the staleness.

    Raises:
        CheckpointError: if that checkpoint was not kept.
        UserError: if `sampled_by` is later than the newest checkpoint.
    """
    with open_run(config, resume=True, attribute_only=True) as trainer:
        sampled, by = None, trainer.state.step if sampled_by is None else sampled_by
        if sampled_by is not None:
            if sampled_by > trainer.state.step:
                raise UserError(
                    f"--sampled-by {sampled_by} lies after the newest checkpoint, of step {trainer.state.step}"
                )
            newest = trainer.policy.copy_weights()
            trainer.checkpoints.load_weights(sampled_by)
            trainer.publish(trainer.state.version)
            sampled = trainer.policy.copy_weights()
            trainer.policy.put_weights(newest)
        else:
            trainer.publish(trainer.state.version)
        found = _attribute(trainer, prompts, sampled=sampled, layers=layers)
        if trainer.lead is not None:
            trainer.lead.log.append(found.record(trainer.state.step, by))
            console = Console()
            console.print(found.table(by))
            for sentence in found.verdict:
                console.print(sentence, highlight=False, soft_wrap=True)


def _find_lost(lead: Lead) -> int:
    """Mark engines that are not healthy as lost, and return the number of live engines."""
    lead.pool.find_lost()
    return len(lead.pool.live_urls)


def _attribute(trainer: Trainer, prompts: int, *, sampled: list[Tensor] | None, layers: bool = False) -> Attribution:
    config, state = trainer.config, trainer.state

    def draw(lead: Lead) -> AttributionProbe:
        pool, rollouts = lead.pool, lead.rollouts
        serving = [url for url in pool.live_urls if url not in pool.quarantined]
        if not serving:
            raise EngineError(
                f"no engine serves weight version {state.version}, so no mismatch can be attributed: {pool.quarantined}"
            )
        return draw_probe(
            serving[0],
            prompts_for_step(rollouts.task, state.step, prompts, config.run.seed + _SEED),
            config.rollout,
            stop_token_ids=rollouts.stop,
            seed=config.run.seed + _SEED + state.step,
            version=state.version,
            api_key=pool.api_key,
        )

    probe = trainer.on_lead(draw)
    pool = None if trainer.lead is None else trainer.lead.pool
    folder = config.run.folder / "attribution"
    return attribute(trainer.policy, trainer.plan.precision, pool, probe, folder, sampled=sampled, layers=layers)
