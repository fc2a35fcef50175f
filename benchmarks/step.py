"""Our training step against a bare megatron-core step: same model, same tokens, same optimizer, one process.

The bare step is a hand-written step with megatron-core: its GPTModel on the packed stream, its vocab-parallel cross
entropy over all logits, its schedule, its optimizer. Our step adds the packing, the chunked log-probabilities and
entropy, the objective, the finite check and the collection of per-token results.
Prints a table, and one JSON line for docs/benchmarks.md.

    python benchmarks/step.py [--hidden 128 --layers 4 --vocab 512 --tokens 2048 --repeat 15]
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from memory import peak_bytes
from models import build_planned_policy, make_qwen3

from megatron_rl.config import make_config
from megatron_rl.objectives import make_objective
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device_copy import on_device
from megatron_rl.policy.device_port import pick_device
from megatron_rl.policy.packing import pack, shard
from megatron_rl.policy.shares import make_shares
from megatron_rl.types import Batch


def make_batch(args: argparse.Namespace) -> Batch:
    """Return trajectories that fill one micro-batch exactly. `prompt_share` of each is prompt, the rest is trained."""
    rng = np.random.default_rng(0)
    share = np.array([0.15, 0.1, 0.25, 0.06, 0.03, 0.2, 0.12, 0.09])
    lengths = (share * args.tokens).astype(int)
    lengths[-1] = args.tokens - lengths[:-1].sum()
    cu = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(args.tokens) - np.repeat(cu[:-1], lengths)
    mask = (position >= np.maximum(1, args.prompt_share * np.repeat(lengths, lengths))).astype(np.float32)
    rows = np.arange(len(lengths))
    return Batch(
        ids=rows,
        groups=rows,
        tokens=rng.integers(0, args.vocab, args.tokens).astype(np.int32),
        cu_seqlens=cu,
        mask=mask,
        rewards=np.zeros(len(rows), dtype=np.float32),
        advantages=rng.standard_normal(len(rows)).astype(np.float32),
        logmu=np.full(args.tokens, -np.log(args.vocab), dtype=np.float32) * mask,
    )


def bare_step(policy: Policy, batch: Batch, budget: int) -> Callable[[], None]:
    """Return a step on the same DDP model and optimizer with GPTModel's own forward and cross entropy.

    Args:
        policy: the policy whose model and optimizer are used.
        batch: trajectories that fill one micro-batch.
        budget: tokens of the micro-batch.
    """
    (share,) = make_shares(batch, replicas=1, budget=budget, align=1, multiple=1, unit=budget, split=True)
    micro = pack(share)[0]
    here = micro, shard(micro, cp_size=1, cp_rank=0, max_length=budget + 1)
    micro, piece = on_device(here, policy.mesh.device)
    labels, mask = micro.labels[None], micro.mask[None]
    model, chunk = policy.models[0], policy.chunks[0]

    def forward(_: object) -> torch.Tensor:
        return GPTModel.forward(
            model, piece.tokens, piece.positions, None, labels=labels, packed_seq_params=piece.stream
        )

    def forward_step(feed, wrapped):
        next(feed)
        loss_T = wrapped(None)

        def loss(output: torch.Tensor):
            total = (output * mask).sum() / mask.sum()
            return total, torch.zeros((), dtype=torch.int, device=total.device), {"loss": total.detach()}

        return loss_T, loss

    def step() -> None:
        chunk.zero_grad_buffer()
        policy.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([0]),
            model=chunk,
            num_microbatches=1,
            seq_length=budget,
            micro_batch_size=1,
            forward_only=False,
        )
        policy.optimizer.core.step()

    ours = type(model).forward

    def timed() -> None:
        type(model).forward = lambda self, x: forward(x)
        try:
            step()
        finally:
            type(model).forward = ours

    return timed


def seconds(step: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 128), ("layers", 4), ("vocab", 512), ("tokens", 2048), ("repeat", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt-share", type=float, default=0.0, help="part of each trajectory that is not trained")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen3(Path(folder), hidden=args.hidden, layers=args.layers, vocab=args.vocab, tied=False)
        config = make_config(
            {
                "model": {"path": str(model)},
                "optimizer": {"tokens_per_microbatch": args.tokens, "updates_per_step": 1},
                "rollout": {"max_prompt_tokens": args.tokens // 2, "max_new_tokens": args.tokens // 2},
            }
        )
        device = pick_device("auto")
        policy = build_planned_policy(config, parallel.initialize(config.parallel, device, seed=0))
    batch, objective = make_batch(args), make_objective({"name": "drpo"})
    bare = bare_step(policy, batch, args.tokens)
    ours = lambda: policy.update(batch, objective, objective.norm)  # noqa: E731
    for step in (bare, ours, bare, ours):
        step()
    pairs = [(seconds(bare), seconds(ours)) for _ in range(args.repeat)]
    ratio = statistics.median(b / a for a, b in pairs)
    times = [statistics.median(column) for column in zip(*pairs, strict=True)]
    memory = [peak_bytes(step) for step in (bare, ours)]
    print(f"{'':<28}{'bare mcore':>14}{'megatron_rl':>14}{'ratio':>9}")
    print(f"{'step, ms (median)':<28}{times[0] * 1e3:>14.1f}{times[1] * 1e3:>14.1f}{ratio:>9.3f}")
    print(f"{'tokens/s':<28}{args.tokens / times[0]:>14.0f}{args.tokens / times[1]:>14.0f}")
    print(
        f"{'peak tensor memory, MiB':<28}{memory[0] / 2**20:>14.1f}{memory[1] / 2**20:>14.1f}"
        f"{memory[1] / memory[0]:>9.3f}"
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        json.dumps(
            {**vars(args), "device": name, "ratio": ratio, "ms": times, "peak_bytes": memory, "max_rss_mib": rss}
        )
    )
    parallel.shutdown()


if __name__ == "__main__":
    main()
