"""A training step with perturbed layers against one without: seconds of processor time, and what is kept for backward.

Both run in one process, in turns, on the same tokens. Prints a line per model, and one JSON line for docs/benchmarks.md.

    python benchmarks/alp.py [--repeat 10]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_rl.config import make_config
from megatron_rl.objectives import make_objective
from megatron_rl.policy import parallel
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.device import pick_device
from megatron_rl.types import Batch

MODELS = {"tiny": (128, 2, 320), "medium": (512, 8, 4096)}  # hidden size, layers, vocabulary
SEQUENCES, LENGTH = 32, 64


def make_model(folder: Path, hidden: int, layers: int, vocab: int) -> Path:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_batch(vocab: int) -> Batch:
    rng, total = np.random.default_rng(0), SEQUENCES * LENGTH
    mask = np.tile(np.arange(LENGTH) >= LENGTH // 2, SEQUENCES).astype(np.float32)
    return Batch(
        ids=np.arange(SEQUENCES),
        groups=np.arange(SEQUENCES) // 8,
        tokens=rng.integers(0, vocab, total).astype(np.int32),
        cu_seqlens=np.arange(0, total + 1, LENGTH),
        mask=mask,
        rewards=np.zeros(SEQUENCES, dtype=np.float32),
        advantages=rng.standard_normal(SEQUENCES).astype(np.float32),
        logmu=(rng.uniform(-7, -4, total) * mask).astype(np.float32),
    )


def make_policy(folder: Path, enabled: bool) -> Policy:
    config = make_config(
        {
            "model": {"path": str(folder)},
            "alp": {"enabled": enabled},
            "optimizer": {"tokens_per_microbatch": SEQUENCES * LENGTH},
            "rollout": {"max_prompt_tokens": 32, "max_new_tokens": 32},
        }
    )
    return Policy(config, parallel.initialize(config.parallel, pick_device("auto"), seed=0))


def measure(folder: Path, vocab: int, repeat: int) -> dict[str, Any]:
    """Processor seconds of a step, least of all repetitions, and bytes saved for backward, each without and with."""
    batch, objective = make_batch(vocab), make_objective({"name": "drpo", "delta": 0.15})
    assert objective.norm is not None
    policies = [make_policy(folder, enabled) for enabled in (False, True)]
    seconds: list[list[float]] = [[], []]
    saved = [0, 0]
    for turn in range(repeat + 1):
        for which, policy in enumerate(policies):
            if turn == 0:  # warms up, and counts
                sizes: list[int] = []
                with torch.autograd.graph.saved_tensors_hooks(lambda t, n=sizes: n.append(t.nbytes) or t, lambda t: t):
                    policy.update(batch, objective, objective.norm)
                saved[which] = sum(sizes)
                continue
            start = time.process_time()
            policy.update(batch, objective, objective.norm)
            seconds[which].append(time.process_time() - start)
    least = [min(column) for column in seconds]
    middle = [statistics.median(column) for column in seconds]
    return {
        "seconds": [round(value, 4) for value in least],
        "overhead": round(least[1] / least[0] - 1, 4),
        "overhead_of_medians": round(middle[1] / middle[0] - 1, 4),
        "bytes_saved": saved,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, (hidden, layers, vocab) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(make_model(Path(folder), hidden, layers, vocab), vocab, args.repeat)
        off, on = results[name]["bytes_saved"]
        print(
            f"{name}: step {results[name]['overhead']:+.1%}, bytes kept for backward {off} -> {on} ({on - off:+d})", flush=True
        )
    print(json.dumps(results))
    parallel.shutdown()


if __name__ == "__main__":
    main()
