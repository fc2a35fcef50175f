"""Print how often 95 % intervals of a study's statistics contain the truth, on simulated data.

    python benchmarks/coverage.py

The table of docs/study_statistics.md is this output. The tests in tests/unit/statistics hold the package to it.
"""

import numpy as np

from megatron_rl.statistics.bootstrap import seed_prompt_bootstrap
from megatron_rl.statistics.equivalence import tost
from megatron_rl.statistics.paired import crossed_difference, prompt_difference, seed_difference

SIMULATIONS, PROMPTS = 4_000, 60
BOOTSTRAPS, DRAWS = 1_000, 400
SCENES = (
    # what dominates, standard deviations of seeds, prompts and noise
    ("seeds", 0.30, 0.10, 0.3),
    ("prompts", 0.03, 0.50, 1.0),
    ("noise", 0.03, 0.00, 1.0),
    ("all alike", 0.10, 0.50, 0.8),
)


def main() -> None:
    rng = np.random.default_rng(0)
    print("| what varies most | seeds | crossed t | t on seed means | bootstrap | prompts as independent | TOST |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, by_seed, by_prompt, noise in SCENES:
        for seeds in (2, 3, 5, 10, 20):
            deltas = (
                by_seed * rng.standard_normal((SIMULATIONS, seeds, 1))
                + by_prompt * rng.standard_normal((SIMULATIONS, 1, PROMPTS))
                + noise * rng.standard_normal((SIMULATIONS, seeds, PROMPTS))
            )
            found = crossed_difference(deltas)
            pooled = prompt_difference(deltas.reshape(SIMULATIONS, -1), np.zeros((SIMULATIONS, seeds * PROMPTS)))
            drawn = [seed_prompt_bootstrap(one, rng, draws=DRAWS).covers(0) for one in deltas[:BOOTSTRAPS]]
            margin = 3 * np.sqrt(by_seed**2 / seeds + by_prompt**2 / PROMPTS + noise**2 / seeds / PROMPTS)
            false = tost(crossed_difference(deltas + margin), margin).equivalent.mean()
            shares = (found.covers(0).mean(), seed_difference(deltas.mean(-1)).covers(0).mean(), np.mean(drawn))
            texts = " | ".join(f"{100 * share:.1f}" for share in (*shares, pooled.covers(0).mean(), false))
            print(f"| {name} | {seeds} | {texts} |")


if __name__ == "__main__":
    main()
