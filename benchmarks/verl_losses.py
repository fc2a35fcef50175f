"""Objectives against verl's functions of the same name: forward and backward, alternately in one process.

Both get the same random tokens, padded [rows, length], as verl's trainer feeds them; ours also get them packed, as this
project's trainer feeds them. Times are of the calling thread, and ratios medians over rounds. `loss` is ours minus
verl's: where options differ by default, so do the losses. Prints a table, and one JSON line for docs/benchmarks.md.

    make verl-losses      # or: PYTHONPATH=.verl python benchmarks/verl_losses.py [--rows 64 --length 2048 --fill 0.5]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from objectives import given, make_inputs, pack, runner
from timing import seconds
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import ActorConfig, PolicyLossConfig

from megatron_rl.objectives import LossInputs, make_objective

# Ours by verl's name, with the options that make ours compute what verl's does by default.
PAIRS: dict[str, dict[str, Any]] = {
    "vanilla": {"name": "ppo"},
    "gspo": {"name": "gspo"},
    "sapo": {"name": "sapo"},
    "cispo": {"name": "cispo"},
    "dppo_tv": {"name": "dppo_tv"},
    "dppo_kl": {"name": "dppo_kl"},
}


def theirs(name: str) -> Callable[[LossInputs], Tensor]:
    """Return verl's loss as a function of the inputs."""
    mode = "seq-mean-token-mean" if name == "gspo" else "token-mean"
    policy_loss = PolicyLossConfig(loss_mode=name)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        policy_loss=policy_loss,
    )
    function = POLICY_LOSS_REGISTRY[name]

    def loss(x: LossInputs) -> Tensor:
        advantages = x.advantages[:, None].expand_as(x.mask)
        keys = {"old_log_prob": x.logmu, "log_prob": x.logp, "advantages": advantages, "response_mask": x.mask}
        return function(**keys, loss_agg_mode=mode, config=config)[0]

    return loss


def measure(x: LossInputs, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of the three ways, ratios to verl, and the difference of the losses."""
    objective = make_objective(PAIRS[name])
    packed = pack(x)
    assert objective.norm is not None
    norm = replace(objective.norm, tokens=packed.mask.numel(), sequences=args.rows, horizon=args.length)
    packed = replace(packed, norm=norm)
    verl = theirs(name)
    runs = {
        "verl": runner(x, verl),
        "padded": runner(given(x, objective), lambda inputs: objective(inputs).loss),
        "packed": runner(given(packed, objective), lambda inputs: objective(inputs).loss),
    }
    for run in [*runs.values()] * 2:
        run()
    rounds = [{way: seconds(run, "cpu") for way, run in runs.items()} for _ in range(args.repeat)]
    return {
        "name": name,
        "ours": PAIRS[name]["name"],
        **{f"{way}_ms": statistics.median(one[way] for one in rounds) * 1e3 for way in runs},
        **{way: statistics.median(one[way] / one["verl"] for one in rounds) for way in ("padded", "packed")},
        "difference": float(objective(given(x, objective)).loss - verl(x)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("rows", 64), ("length", 2048), ("repeat", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--fill", type=float, default=0.5)
    args = parser.parse_args()
    args.packed, args.device = False, "cpu"
    torch.set_num_threads(1)
    x = make_inputs(args)
    rows = [measure(x, name, args) for name in PAIRS]
    print(f"{'verl':<10}{'ours':<10}{'verl, ms':>10}{'padded':>8}{'packed':>8}{'loss':>12}")
    for row in rows:
        print(
            f"{row['name']:<10}{row['ours']:<10}{row['verl_ms']:>10.1f}{row['padded']:>8.2f}{row['packed']:>8.2f}"
            f"{row['difference']:>12.2g}"
        )
    print(json.dumps({"rows": rows, "fill": args.fill, "shape": [args.rows, args.length]}))


if __name__ == "__main__":
    main()
