"""Tokens per second of the embedded server, and of SGLang, against plain `transformers.generate` on the same batch.

*Plain* is one call of `generate` in this process: prompts padded on the left, sampled at temperature 1, no
log-probabilities, every row as long as the longest. Engines get requests over HTTP, return log-probabilities, and end
each row at its own length. `equal`: all rows have one length. `mixed`: lengths are spread evenly from a quarter of it
up to it, because lengths of responses also differ. Only requested tokens count. Each has one thread. Engines and plain
alternate, and the ratio is a median of pairs. Prints a table, and one JSON line for docs/benchmarks.md.

    python benchmarks/rollout.py [--hidden 128 --layers 2 --prompts 16 --samples 8 --tokens 128 --repeat 5] [--sglang]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from models import make_qwen3
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_rl.config import PrecisionConfig, SGLangConfig
from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.sglang import SGLangServers, server_flags
from megatron_rl.precision.plan import resolve

PAD = 0


def make_prompts(args: argparse.Namespace) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [8 + 24 * at // args.prompts for at in range(args.prompts)]
    return [tuple(torch.randint(4, args.vocab, (length,), generator=generator).tolist()) for length in lengths]


def plain(
    folder: Path, prompts: Sequence[tuple[int, ...]], args: argparse.Namespace
) -> Callable[[Sequence[int]], None]:
    """Return a function that calls `generate` on all samples of all prompts at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(args.samples)]
    ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def run(lengths: Sequence[int]) -> None:
        count = max(lengths)
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=PAD,
        )
        out = model.generate(ids, attention_mask=mask, generation_config=config)
        assert out.shape[1] == longest + count

    return run


def asked(
    pool: EnginePool, prompts: Sequence[tuple[int, ...]], args: argparse.Namespace
) -> Callable[[Sequence[int]], None]:
    """Return a function that requests the same samples from the pool's engine: one request per prompt and length."""
    calls = iter(range(1 << 30))

    def run(lengths: Sequence[int]) -> None:
        call = next(calls)
        requests = [
            GenerationRequest(
                f"{call}-{at}", prompt, args.samples, SamplingParams(max_new_tokens=length, ignore_eos=True)
            )
            for at, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        answers = pool.generate(requests)
        for length, answer in zip(lengths, answers, strict=True):
            assert all(len(sample.tokens) == length and sample.logmu is not None for sample in answer)

    return run


def wall(run: Callable[[Sequence[int]], None], lengths: Sequence[int]) -> float:
    start = time.perf_counter()
    run(lengths)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 128, "layers": 2, "vocab": 320, "prompts": 16, "samples": 8, "tokens": 128, "repeat": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sglang", action="store_true", help="SGLang, too (needs make sglang)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hf"
        make_qwen3(folder, hidden=args.hidden, layers=args.layers, vocab=args.vocab)
        servers: dict[str, EmbeddedServers | SGLangServers] = {
            "embedded": EmbeddedServers(folder, folder.parent, threads=1)
        }
        if args.sglang:
            settings, plan = SGLangConfig(), resolve(PrecisionConfig(), args.layers, engine="sglang", device="cpu")
            flags = server_flags(plan, settings, device="cpu")
            servers["sglang"] = SGLangServers(folder, folder.parent, flags, settings)
        prompts = make_prompts(args)
        runs = {"generate": plain(folder, prompts, args)}
        for name, server in servers.items():
            pool = stack.enter_context(EnginePool(list(stack.enter_context(server).urls)))
            runs[name] = asked(pool, prompts, args)
        spread = [
            args.tokens // 4 + 3 * args.tokens * at // (4 * max(1, args.prompts - 1)) for at in range(args.prompts)
        ]
        cases = {"equal": [args.tokens] * args.prompts, "mixed": spread}
        results = [measure(case, runs, lengths, args) for case, lengths in cases.items()]
    print(json.dumps({**vars(args), "device": "CPU, 1 thread each", "results": results}))


def measure(
    case: str, runs: dict[str, Callable], lengths: Sequence[int], args: argparse.Namespace
) -> dict[str, object]:
    wanted = args.samples * sum(lengths)
    for run in runs.values():
        run(lengths)
    rounds = [{name: wall(run, lengths) for name, run in runs.items()} for _ in range(args.repeat)]
    out: dict[str, object] = {"case": case, "tokens": wanted}
    for name in runs:
        rate = statistics.median(wanted / one[name] for one in rounds)
        ratio = statistics.median(one["generate"] / one[name] for one in rounds)
        out[name] = {"tokens_per_s": rate, "ratio": ratio}
        print(f"{case:<8}{name:<12}{rate:>10.0f} tokens/s{ratio:>8.2f} x generate")
    return out


if __name__ == "__main__":
    main()
