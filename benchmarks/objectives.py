"""Every objective against a hand-written PPO surrogate in eager torch, on the same tokens, alternately in one process.

The hand-written PPO is the minimum of a training script: clamped log-ratio, clip, masked token mean. It has no metrics
and no checks. Our objectives add checks of shapes and values, masking that stops inf and nan, the per-token weight and
the method's own metrics. Each round times PPO and one objective back to back, forward and backward. The ratio is the
median over rounds. On CPU the time is that of the calling thread, so that other processes count only through the
caches they empty. Peak memory is the largest sum of bytes allocated and not yet freed during one call (CPU: torch's
profiler; CUDA: its allocator), without the inputs. Prints a table, and one JSON line for docs/benchmarks.md.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py [--rows 64 --length 2048 --fill 0.5 --repeat 25]
                                                      [--device cpu --packed]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from memory import peak_bytes
from rich.console import Console
from rich.table import Table
from timing import seconds
from torch import Tensor

from megatron_rl.objectives import OBJECTIVES, LossInputs, Objective, make_objective

TOP_K = 8


def make_inputs(args: argparse.Namespace) -> LossInputs:
    """Return random float32 inputs with every optional tensor.

    `fill` is the average part of the tokens that is trained; 1.0 means no padding.
    """
    g = torch.Generator().manual_seed(0)
    shape = (args.rows, args.length)
    lengths = (args.length * args.fill * (0.5 + torch.rand(args.rows, generator=g))).long().clamp(1, args.length)
    if args.fill == 1:
        lengths = torch.full((args.rows,), args.length)
    logp = -3 * torch.rand(shape, generator=g)
    advantages = torch.randn(args.rows, generator=g)
    topk = torch.log_softmax(torch.randn(*shape, TOP_K + 1, generator=g), -1)[..., :TOP_K]
    x = LossInputs(
        logp=logp,
        logmu=logp + 0.2 * torch.randn(shape, generator=g),
        advantages=advantages,
        mask=(torch.arange(args.length) < lengths[:, None]).float(),
        logold=logp + 0.1 * torch.randn(shape, generator=g),
        logref=logp + 0.2 * torch.randn(shape, generator=g),
        rewards=(advantages > 0).float(),
        topk=(topk, topk + 0.01),
    )
    return move(pack(x) if args.packed else x, args.device)


def pack(x: LossInputs) -> LossInputs:
    """Return the same tokens as one stream [1, T] without padding, as the trainer feeds them."""
    keep = x.mask > 0
    owner = torch.arange(len(x.mask))[:, None].expand_as(x.mask)

    def flat(values: Tensor) -> Tensor:
        return (values[:, None].expand_as(x.mask) if values.ndim == 1 else values)[keep][None]

    assert x.logmu is not None and x.logold is not None and x.logref is not None
    assert x.rewards is not None and x.topk is not None
    return LossInputs(
        logp=flat(x.logp),
        logmu=flat(x.logmu),
        advantages=flat(x.advantages),
        mask=flat(x.mask),
        logold=flat(x.logold),
        logref=flat(x.logref),
        rewards=flat(x.rewards),
        topk=(flat(x.topk[0]), flat(x.topk[1])),
        seq_ids=flat(owner),
    )


def move(x: LossInputs, device: str) -> LossInputs:
    tensors = {name: value.to(device) for name, value in vars(x).items() if isinstance(value, Tensor)}
    return replace(x, **tensors, topk=None if x.topk is None else (x.topk[0].to(device), x.topk[1].to(device)))


def plain_ppo(x: LossInputs) -> Tensor:
    """Return the hand-written clipped surrogate, as token mean."""
    advantages = x.advantages[:, None] if x.advantages.ndim == 1 else x.advantages
    ratio = (x.logp - x.logmu).clamp(-20, 20).exp()
    loss_tok = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (loss_tok * x.mask).sum() / x.mask.sum()


def runner(x: LossInputs, forward: Callable[[LossInputs], Tensor]) -> Callable[[], None]:
    """Return a function that runs forward and backward to a new leaf `logp`."""

    def run() -> None:
        logp = x.logp.detach().requires_grad_()
        forward(replace(x, logp=logp)).backward()

    return run


def given(x: LossInputs, objective: Objective) -> LossInputs:
    """Return the inputs with only those optional tensors that the objective needs."""
    optional = ("logmu", "logold", "logref", "rewards", "entropy", "topk")
    return replace(x, **{name: None for name in optional if name not in objective.needs})


def measure(x: LossInputs, name: str, args: argparse.Namespace) -> dict[str, float | str]:
    """Measure an objective and plain PPO.

    Returns: milliseconds of both, the median ratio of back-to-back pairs, and peak bytes of both.
    """
    objective = make_objective({"name": name})
    if args.packed:  # The trainer passes the counts of the whole update.
        assert objective.norm is not None
        x = replace(x, norm=replace(objective.norm, tokens=x.mask.numel(), sequences=args.rows, horizon=args.length))
    ours = runner(given(x, objective), lambda inputs: objective(inputs).loss)
    plain = runner(x, plain_ppo)
    for run in (plain, ours, plain, ours):
        run()
    pairs = [(seconds(plain, args.device), seconds(ours, args.device)) for _ in range(args.repeat)]
    plain_ms, ours_ms = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    return {
        "name": name,
        "ms": ours_ms,
        "plain_ms": plain_ms,
        "ratio": statistics.median(b / a for a, b in pairs),
        "peak": peak_bytes(ours),
        "plain_peak": peak_bytes(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("rows", 64), ("length", 2048), ("repeat", 25)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument(
        "--fill", type=float, default=0.5, help="part of the tokens that is trained, on average; 1: no padding"
    )
    parser.add_argument("--packed", action="store_true", help="one stream without padding, as the trainer feeds it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", default=sorted(OBJECTIVES), choices=sorted(OBJECTIVES))
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    x = make_inputs(args)
    rows = [measure(x, name, args) for name in args.only]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, 1 thread"
    kind = "one stream" if args.packed else f"{x.mask.mean().item():.0%} trained"
    title = f"{list(x.logp.shape)} float32, {kind}, forward and backward, {device}, torch {torch.__version__}"
    table = Table("objective", "ms", "plain PPO, ms", "ratio", "peak, MiB", "plain PPO, MiB", title=title)
    for row in rows:
        numbers = [row["ms"], row["plain_ms"], row["ratio"], row["peak"] / 2**20, row["plain_peak"] / 2**20]
        table.add_row(str(row["name"]), *(f"{value:.2f}" for value in numbers))
    Console().print(table)
    print(json.dumps({**vars(args), "device": device, "rows": rows}))


if __name__ == "__main__":
    main()
