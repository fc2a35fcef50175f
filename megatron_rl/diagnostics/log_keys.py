"""The keys of `log.jsonl`: one table with the meaning and unit of each, and where it is computed."""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class LogKey:
    """One key of the run log, or a pattern of keys.

    Attributes:
        name: the key. A word in angle brackets stands for one of `PLACEHOLDERS`.
        meaning: what the value is.
        unit: its unit; "" for a number without one.
        place: `module.function` below `megatron_rl` that computes it.
        prefixes: the key is also logged with each of these in front of it.
    """

    name: str
    meaning: str
    unit: str
    place: str
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LogSection:
    """Keys that belong together, under a title and with a sentence that holds for all of them."""

    title: str
    text: str
    keys: tuple[LogKey, ...]


def _keys(place: str, *rows: tuple[str, str, str], prefixes: tuple[str, ...] = ()) -> tuple[LogKey, ...]:
    return tuple(LogKey(name, meaning, unit, place, prefixes) for name, meaning, unit in rows)


_MU = ("mismatch/",)
_STAGES = ("erpd/teacher/", "erpd/student/")
_NATS, _SHARE, _PROBABILITY = "nats/token", "share", "probability"

# Word in angle brackets -> regular expression of what may stand there.
PLACEHOLDERS = {
    "phase": "rollout|batch|update|teacher|teacher_eval|student|attribution|sync",
    "layer": r"\d+|logits|qkv|proj|fc1|fc2",
    "correction": "(tis|mis)(_sequence)?|icepop|geo_mask|stale_mask",
    "objective": "naive|scaled_po|asympo",
    "k": r"\d",
    "s": r"\d+",
    "source": "decode|kernel|activation|sync|weight|recipe|staleness|total",
}

SECTIONS = (
    LogSection(
        "Every record",
        "A record without `version` is of kind `erpd`.",
        _keys(
            "diagnostics.runlog.RunLog",
            ("kind", "`step`, `eval`, `erpd` or `attribution`", "text"),
            ("step", "of `step` and `erpd`: number of the step, from 0; of the others: steps done", "steps"),
            ("version", "version of the weights: that a step started from, or that was evaluated", "versions"),
        ),
    ),
    LogSection(
        "Step: batch",
        "Over the trajectories that the step trains on.",
        _keys(
            "trainer.metrics.batch_record",
            ("reward/mean", "mean reward", ""),
            ("reward/std", "standard deviation of the rewards", ""),
            ("pass_rate", "trajectories with a reward above 0.5", _SHARE),
            ("response_length/mean", "trained tokens of a response", "tokens"),
            ("tokens/response", "trained tokens", "tokens"),
            ("tokens/total", "all tokens, prompts included", "tokens"),
            ("tokens_per_s", "all tokens over `seconds/total`", "tokens/s"),
            ("seconds/total", "wall clock of the step", "s"),
            ("seconds/<phase>", "wall clock of a phase; `rollout`: the trainer waited for the batch", "s"),
        )
        + _keys(
            "trainer.metrics.staleness_record",
            ("staleness/mean", "mean age of the trained tokens", "versions"),
            ("staleness/max", "largest age of a trained token", "versions"),
        )
        + _keys(
            "sampling.rollouts.Rollouts.collect",
            ("truncated", "responses that reached `rollout.max_new_tokens`", _SHARE),
            ("rollout/drawn", "draws of prompts that the run has consumed so far", "prompts"),
        )
        + _keys(
            "sampling.step_groups.StepGroups.counts",
            ("rollout/given_up", "groups that were started beyond the need and discarded", "groups"),
            ("rollout/given_up_share", "their share of all groups started", _SHARE),
            ("rollout/replaced", "groups replaced because their rewards are all equal", "groups"),
            ("rollout/kept_equal", "groups kept although their rewards are all equal", "groups"),
            ("rollout/dropped_stale", "groups discarded because of their weight versions", "groups"),
            ("rollout/resumed", "samples resumed after an abort", "samples"),
            ("rollout/retractions", "retractions as the engines count them", "samples"),
        )
        + _keys(
            "sampling.step_groups.StepGroups.tool_use",
            ("tool/calls", "turns after which a tool was run", "turns"),
            ("tool/errors", "those of them whose tool failed", "turns"),
            ("tool/void", "turns that neither called a tool nor answered", "turns"),
        ),
    ),
    LogSection(
        "Step: updates",
        "Means over the updates of the step, `lr` excepted. ERPD logs those of the student; its record of kind `erpd` "
        "has each as a list with one entry per update, under `erpd/teacher/` and `erpd/student/`.",
        _keys(
            "trainer.metrics.update_record",
            ("loss", "loss, regularization terms included", ""),
            ("grad_norm", "L2 norm of the gradient before clipping", ""),
            ("update/skipped", "updates whose gradient is 0, so the optimizer makes no step", _SHARE),
            ("entropy", "entropy of the policy, mean over trained tokens", _NATS),
            prefixes=_STAGES,
        )
        + _keys("trainer.metrics.mean_update", ("lr", "learning rate of the last update", ""))
        + _keys(
            "policy.optimizer.Gradients",
            ("optimizer/loss_scale", "fp16: loss scale of the gradients", ""),
            ("optimizer/overflows", "fp16: overflows before the gradients were finite", "count"),
            prefixes=_STAGES,
        )
        + _keys(
            "policy.routing_replay.RoutingReplay.record",
            ("routing/replayed", "replayed pairs of token and layer, of all pairs of the batch", _SHARE),
            ("routing/agreement", "replayed pairs for which the trainer's router chose the same experts", _SHARE),
            prefixes=_STAGES,
        )
        + _keys(
            "policy.quantized_products.ProductMonitor.record",
            ("precision/gemms/<layer>", "products of these linears that ran quantized, summed over ranks", "count"),
            prefixes=_STAGES,
        )
        + _keys(
            "policy.update_stats.gather_sigmas",
            ("alp/sigma/<layer>", "ALP: scale of the noise of a layer, from 0, or of the logits", ""),
            ("alp/sigma_min", "smallest scale", ""),
            ("alp/sigma_mean", "mean scale over layers", ""),
            ("alp/sigma_max", "largest scale", ""),
            prefixes=_STAGES,
        ),
    ),
    LogSection(
        "Step: objective",
        "Each objective logs its own. Means over the trained tokens of an update, then over the updates.",
        _keys("objectives.objective.Objective", ("kl_ref", "KL to the reference policy", _NATS), prefixes=_STAGES)
        + _keys(
            "objectives.score_centering.ScoreCentering",
            ("centering/size", "sum of abs of the coefficients of the engine's top-K tokens, mean over tokens", ""),
            ("centering/tail", "the engine's probability outside its top K, mean over tokens", _PROBABILITY),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.grpo.PPO",
            ("clip/high", "tokens without gradient above the clip (`cispo`: with a bounded weight)", _SHARE),
            ("clip/low", "the same below the clip", _SHARE),
            ("clip/dual", "tokens without gradient above `dual_clip`", _SHARE),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.dppo.DPPO",
            ("mask/high", "tokens masked because the divergence is too large upward", _SHARE),
            ("mask/low", "the same downward", _SHARE),
            ("divergence", "divergence that the mask is made from", ""),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.cppo.CPPO",
            ("cppo/prefix", "tokens masked for what their prefix has used, within `delta` themselves", _SHARE),
            ("cppo/budget", "budget that each token of the prefix adds, mean over responses", ""),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.opd.OPD",
            ("opd/distance", "log pi - log pi_ref of the sampled tokens; estimates the KL to the teacher", _NATS),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.ratio.RatioObjective",
            ("log_ratio/square", "mean of (log r)^2, if `log_ratio_coef` is not 0", "nats^2"),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.drpo.DRPO",
            ("penalty", "`drpo`, `simple_po`: the quadratic penalty of the loss", ""),
            ("corrective", "`drpo`, `simple_po`: tokens with a negative weight", _SHARE),
            prefixes=_STAGES,
        )
        + _keys("objectives.sapo.SAPO", ("gate", "weight of the soft gate", ""), prefixes=_STAGES)
        + _keys(
            "objectives.corrections",
            ("<correction>/weight", "weight of a correction", ""),
            ("weight/truncated", "tokens whose ratio is at `truncation` (`minirl`, `dppo_*`)", _SHARE),
            ("<correction>/truncated", "tokens whose weight is at its bound", _SHARE),
            ("<correction>/masked", "tokens that a correction masks", _SHARE),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.scaled_po.Naive",
            ("<objective>/naive_loss", "`naive`, `scaled_po`, `asympo`: loss without a scale", ""),
            ("<objective>/pull", "-A logp of tokens with a positive advantage", _NATS),
            ("<objective>/push", "-|A| logp of tokens with a negative advantage", _NATS),
            ("<objective>/positive", "positive part of the advantages", ""),
            ("<objective>/negative", "negative part of the advantages", ""),
            ("<objective>/s_p", "pull over positive", "nats"),
            ("<objective>/s_n", "push over negative", "nats"),
            ("<objective>/s_ratio", "s_n over s_p", ""),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.asympo.ASymPO",
            ("asympo/clip_high", "tokens held at `p_high`", _SHARE),
            ("asympo/clip_low", "tokens held at `p_low`", _SHARE),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.erpd.ErpdMSE",
            ("erpd_mse/pi", "mean probability of a token", _PROBABILITY),
            ("erpd_mse/positives", "tokens of positive trajectories", _SHARE),
            ("erpd_mse/pi_times_positives", "their part of erpd_mse/pi", _PROBABILITY),
            ("erpd_mse/pi_positive", "mean probability of tokens of positive trajectories", _PROBABILITY),
            ("erpd_mse/pi_negative", "mean probability of tokens of the others", _PROBABILITY),
            prefixes=_STAGES,
        )
        + _keys(
            "objectives.erpd.ErpdCE",
            ("erpd_ce/implicit_reward", "beta times the log ratio of a trajectory to the old policy", "nats"),
            ("erpd_ce/accuracy", "trajectories whose implicit reward has the sign of their reward", _SHARE),
            prefixes=_STAGES,
        ),
    ),
    LogSection(
        "Step: trainer and engine",
        "Over the trained tokens, with r = pi / mu. pi is the trainer's policy before the token's update, mu the "
        "engine's, which sampled the token. Only if the engines report log-probabilities. With the prefix `mismatch/`: "
        "only the first update of the step, where both hold the same weights unless tokens are stale.",
        _keys(
            "diagnostics.mismatch.ratio_record",
            ("kl/k1", "KL(mu || pi), estimated by mean(-log r); may be negative", _NATS),
            ("kl/k3", "KL(mu || pi), estimated by mean(r - 1 - log r)", _NATS),
            ("chi2", "mean((r - 1)^2), an estimate of chi-squared(pi || mu) with a heavy tail", ""),
            ("token_mult_prob_error", "mean(exp(abs(log r))), at least 1", ""),
            ("ratio/min", "smallest r", ""),
            ("ratio/max", "largest r", ""),
            ("ratio/ess", "effective sample share (sum r)^2 / (N sum r^2)", _SHARE),
            ("ratio/outside_half_two", "tokens with r outside [1/2, 2]", _SHARE),
            ("dp/mean", "mean of abs(pi - mu)", _PROBABILITY),
            ("dp/max", "maximum of abs(pi - mu)", _PROBABILITY),
            prefixes=_MU,
        )
        + _keys(
            "diagnostics.mismatch.quantile_record",
            *((f"ratio/q{q}", f"{int(q)} % quantile of r", "") for q in ("01", "05", "25", "50", "75", "95", "99")),
            prefixes=(*_MU, "alp/clean/", "alp/perturbed/"),
        )
        + _keys(
            "diagnostics.mismatch.envelope_record",
            ("envelope/p02/<k>", "2 % quantile of r over tokens with mu in [k / 10, (k + 1) / 10)", ""),
            ("envelope/p98/<k>", "98 % quantile of r over the same tokens", ""),
            prefixes=(*_MU, "alp/clean/", "alp/perturbed/"),
        )
        + _keys(
            "trainer.metrics.mismatch_by_staleness",
            ("mismatch/stale_<s>/tokens", "trained tokens that are s versions old", "tokens"),
            ("mismatch/stale_<s>/k3", "k3 over these tokens", _NATS),
            ("mismatch/stale_<s>/mean_abs", "mean of abs(log r) over these tokens", "nats"),
        )
        + _keys(
            "diagnostics.mismatch.worst_record",
            ("worst/max", "the 5 trajectories with the largest abs(log r) of a token: that value", "list, nats"),
            ("worst/mean", "their mean of abs(log r)", "list, nats"),
            ("worst/trajectory", "their ids", "list"),
            ("worst/prompt_ids", "the task's names of their prompts, as a JSON list", "text"),
        ),
    ),
    LogSection(
        "Step: effect of ALP",
        "Over some tokens of the first update, scored with and without noise. `alp/clean/` and `alp/perturbed/` are "
        "quantiles and envelope of r without and with noise.",
        _keys(
            "diagnostics.alp_effect.shift_record",
            *(
                (f"alp/shift/{name}", f"{what} of abs(p_perturbed - p_clean)", _PROBABILITY)
                for name, what in (
                    ("p50", "median"),
                    ("p75", "75 % quantile"),
                    ("p99", "99 % quantile"),
                    ("max", "maximum"),
                )
            ),
            ("alp/unmoved", "tokens whose log-probability is the same in every bit", _SHARE),
        ),
    ),
    LogSection(
        "Kind eval",
        "Held-out problems, with the weights after `step` steps.",
        _keys(
            "sampling.rollouts.Rollouts.evaluate",
            ("eval/greedy", "pass rate of one response at temperature 0", _SHARE),
            ("eval/sampled", "pass rate of `eval.samples` sampled responses", _SHARE),
        ),
    ),
    LogSection(
        "Kind erpd",
        "One round of ERPD. Also the keys of updates and objective under `erpd/teacher/` and `erpd/student/`.",
        _keys(
            "algorithms.erpd.records.round_record",
            ("erpd/teacher/updates", "updates of stage 1", "updates"),
            ("erpd/student/updates", "updates of stage 2", "updates"),
            ("erpd/teacher/kl", "KL(teacher || old policy)", _NATS),
            ("erpd/student/kl", "KL(student || old policy)", _NATS),
            ("erpd/student/clipped", "tokens without gradient, mean over the student's updates", _SHARE),
            ("erpd/teacher/explained_variance", "variance of rewards that the teacher explains", _SHARE),
            ("erpd/shift/edges", "bins of abs(log pi_e - log pi_old), lower edges; the last is open", "list, nats"),
            ("erpd/shift/count", "tokens in each bin", "list, tokens"),
            ("erpd/shift/mean", "mean share of the teacher's shift that the student followed", "list, share"),
            ("erpd/shift/median", "median of the same", "list, share"),
        )
        + _keys(
            "algorithms.erpd.round.ERPD.learn",
            ("erpd/teacher/greedy", "held-out pass rate of the teacher, greedy", _SHARE),
            ("erpd/teacher/sampled", "held-out pass rate of the teacher, sampled", _SHARE),
        ),
    ),
    LogSection(
        "Kind attribution",
        "What each source adds to log r of freshly sampled tokens, and the same for `total`, their sum.",
        _keys(
            "diagnostics.score_chain.ScoreChain.record",
            ("attribution/tokens", "scored tokens", "tokens"),
            ("attribution/<source>/mean_abs", "mean of abs(delta)", "nats"),
            ("attribution/<source>/q99", "99 % quantile of abs(delta)", "nats"),
            ("attribution/<source>/max", "maximum of abs(delta)", "nats"),
            ("attribution/<source>/rms", "root of mean(delta^2)", "nats"),
            ("attribution/<source>/kl", "part of k1: mean(-delta)", "nats"),
            ("attribution/<source>/share", "part of the mean square of log r; may be negative", _SHARE),
        )
        + _keys(
            "attribution.attribute.Attribution.record",
            ("sampled_by", "steps done by the weights that sampled", "steps"),
            ("attribution/sync/tensors", "tensors of engines that differ from what was sent", "tensors"),
            ("attribution/layers", "`--layers`: relative error of each layer's output", "list"),
            ("attribution/verdict", "the conclusions", "text"),
        ),
    ),
)


@cache
def _pattern() -> re.Pattern[str]:
    names = [prefix + key.name for section in SECTIONS for key in section.keys for prefix in ("", *key.prefixes)]
    return re.compile("|".join(re.sub(r"<(\w+)>", lambda found: f"({PLACEHOLDERS[found[1]]})", name) for name in names))


def is_declared(key: str) -> bool:
    """Return whether a key of the run log is in the table."""
    return _pattern().fullmatch(key) is not None
