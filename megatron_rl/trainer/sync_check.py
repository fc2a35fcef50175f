"""The first control experiment of a configuration: with learning rate 0, do trainer and engines agree?

It is a run without updates: weights are loaded on both sides and sent to the engines, the engines sample a step's
batch, and the trainer scores the same tokens under the same weights. All that is left is the mismatch of precisions,
kernels and weight sync. It is done twice, so that an update of the weights is between the two.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_rl.config import Config, RunConfig
from megatron_rl.diagnostics.mismatch import ratio_record
from megatron_rl.errors import ConfigError
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.types import Batch

ROUNDS = 2


@dataclass(frozen=True)
class Bar:
    """A published bound of a mismatch.

    Attributes:
        key: key of `ratio_record`.
        name: what it is, for the reader.
        most: the measured number must be below it.
        source: who published it.
    """

    key: str
    name: str
    most: float
    source: str


BARS = (
    Bar("kl/k3", "k3 in nats a token", 0.015, "mismatch KL of prime-rl"),
    Bar("token_mult_prob_error", "token multiplicative error", 1.05, 'NeMo-RL, guide "Add New Models"'),
)


def check_sync(config: Config) -> bool:
    """Measure and print the mismatch at learning rate 0. Return whether it is below every bar. Collective.

    Nothing is written outside a temporary folder and `rollout.weights_dir`.
    """
    with (
        tempfile.TemporaryDirectory(prefix="megatron-rl-sync-") as folder,
        open_run(without_updates(config, Path(folder)), resume=False) as trainer,
    ):
        records = []
        for step in range(ROUNDS):
            version, watch = trainer.state.version, Stopwatch()
            trainer.turn_to_engines()
            trainer.publish(version)
            batch = trainer.collect(watch)
            trainer.turn_to_trainer(watch)
            logp = trainer.policy.logprobs(batch)
            records.append(trainer.mesh.on_lead(partial(mismatch_record, batch, logp, version)))
            trainer.advance(step + 1, version + 1)
        if trainer.lead is not None:
            print("\n".join(sync_lines(records)), flush=True)
        return not bars_above(records)


def mismatch_record(batch: Batch, logp: np.ndarray, version: int) -> dict[str, float]:
    """Return the mismatch of the engines' samples.

    Args:
        batch: the sampled trajectories.
        logp: [N], the trainer's log-probabilities under the same weights.
        version: version of the weights.

    Raises:
        ConfigError: no sampled token is trained on.
    """
    trained = batch.mask > 0
    if not trained.any():
        raise ConfigError("the engines sampled no token that is trained on: nothing can be compared")
    measured = ratio_record(logp[trained], batch.logmu[trained])
    return measured | {"version": float(version), "tokens": float(trained.sum())}


def without_updates(config: Config, folder: Path) -> Config:
    """Return the configuration of the check: one strict step after the other, with log-probabilities, in `folder`."""
    run = RunConfig(
        name="check", dir=folder, steps=ROUNDS, save_every=0, loggers=(), seed=config.run.seed, device=config.run.device
    )
    strict: dict[str, object] = {"record_logmu": True, "max_staleness": 0, "oversample": 1.0, "max_resampled_groups": 0}
    strict |= {"update_mode": "retract"} if config.rollout.update_mode == "in_place" else {}
    return config.model_copy(update={"run": run, "rollout": config.rollout.model_copy(update=strict)})


def bars_above(records: Sequence[Mapping[str, float]]) -> list[Bar]:
    """Return the bars that a round's record does not keep below."""
    return [bar for bar in BARS if not all(record[bar.key] < bar.most for record in records)]


def sync_lines(records: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the numbers of each round, each bar with its source, and the verdict, as text."""
    text = ["mismatch at learning rate 0: the trainer's log-probabilities of the engines' samples, equal weights"]
    for record in records:
        numbers = ", ".join(f"{bar.name} {record[bar.key]:.3g}" for bar in BARS)
        text.append(
            f"  version {record['version']:.0f}: {record['tokens']:.0f} tokens, {numbers}, "
            f"ratio {record['ratio/min']:.3g} to {record['ratio/max']:.3g}"
        )
    failed = bars_above(records)
    for bar in BARS:
        worst = max(record[bar.key] for record in records)
        word = "ABOVE" if bar in failed else "below"
        text.append(f"  {bar.name}: {worst:.3g}, {word} {bar.most:g} ({bar.source})")
    if not failed:
        return [*text, "verdict: trainer and engines agree"]
    return [
        *text,
        "verdict: trainer and engines DISAGREE before any update: compare precision.train and precision.rollout, then "
        "let a short run attribute it (run.attribute_every: 1)",
    ]
