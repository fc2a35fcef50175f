"""Verify a whole data set: every ground truth against itself, against others, and reworded; and verifications a second.

Run: .venv/bin/python benchmarks/verifier.py --data tests/data/math_excerpt.jsonl
Exits with status 1 if a verdict is wrong.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_rl.tasks.answers import Answer, read_answer, same_answer
from megatron_rl.tasks.final_answer import ground_truth, response_answer
from megatron_rl.tasks.grader import Grader
from megatron_rl.tasks.rows import read_rows, text_cell

# `@` is the answer, in one of several spellings.
WAYS = (
    "#### @", "####@", "####   @  ", "so\n\n#### @\n", "#### @.", "#### **@**", "**#### @**", "#### __@__",
    "#### `@`", "#### *@*", "#### @<br>", "#### @!", "#### $@$", "#### \\(@\\)", "#### \\[@\\]", "#### $@",
    "#### @ dollars", "#### @ clips in total", "#### @ (checked)", "#### Answer: @", "#### Final Answer\n@",
    "#### The answer is @.", "#### **Final Answer:** @", "#### x = @", "#### Total = @", "#### = @",
    "\\boxed{@}", "$\\boxed{@}$", "\\boxed{ @ }", "\\boxed {@}", "$\\boxed @$", "\\fbox{@}",
    "\\boxed{@.}", "\\boxed{\\text{@}}", "\\boxed{\\textbf{@}}", "\\boxed{\\mathbf{@}}",
    "\\boxed{\\$@}", "\\boxed{@\\text{ eggs}}", "\\boxed{x = @}", "**\\boxed{@}**",
    "\\boxed{@}\n\n#### Note:\nx > 0", "\\boxed{@} as in \\boxed{}", "#### @\n##### Check",
    "#### @<|im_end|>",
    "<think>\\boxed{0}? no</think>\n#### @", "<think>a #### 1</think> \\boxed{@}", "#### 1\n#### @",
    "#### @\n\nQuestion: 1+1?\n#### 2", "it is @, so\n#### @", "\\[\\boxed{@}\\]",
)  # fmt: skip


def spelled(value: Fraction) -> list[str]:
    """Return spellings of a whole number: with commas, LaTeX separators, decimals, as a fraction."""
    number = int(value)
    return [
        str(number),
        f"{number:,}",
        f"{number:,}".replace(",", "{,}"),
        f"{number:,}".replace(",", "\\,"),
        f"{number}.00",
    ]


def rewordings(truth: Answer) -> Iterator[str]:
    """Yield 50 responses that give a ground truth."""
    whole = truth.amount is not None and truth.amount.value.denominator == 1
    spellings = spelled(truth.amount.value) if whole and truth.amount is not None else [truth.text]
    for at, way in enumerate(WAYS):
        yield way.replace("@", spellings[at % len(spellings)])


def rate(verify: Callable[[], int]) -> tuple[int, float]:
    """Return how many verifications a function made, and how many it makes a second."""
    begun = time.perf_counter()
    count = verify()
    return count, count / (time.perf_counter() - begun)


def main() -> None:
    """Verify a file and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL or parquet file")
    parser.add_argument("--answer-column", default="answer")
    parser.add_argument("--others", type=int, default=20, help="random other rows that each answer is compared with")
    parser.add_argument("--formulas", type=int, default=200, help="formulas to time")
    options = parser.parse_args()
    texts = [text_cell(place, row, options.answer_column, "--answer-column") for place, row in read_rows(options.data)]
    truths = [read_answer(" ".join((ground_truth(text) or "").split())) for text in texts]
    grader, wrong = Grader(), []

    def judge(at: int, response: str, right: bool) -> None:
        answer = response_answer(response, truth=truths[at].text)
        if (answer is not None and same_answer(truths[at], answer, grader)) is not right:
            wrong.append((truths[at].text, response, right))

    def themselves() -> int:
        for at, text in enumerate(texts):
            judge(at, text, True)
        return len(texts)

    def reworded() -> int:
        for at, truth in enumerate(truths):
            for response in rewordings(truth):
                judge(at, response, True)
        return len(truths) * len(WAYS)

    def others() -> int:
        draws = np.random.default_rng(0).integers(len(truths), size=(len(truths), options.others))
        for at, row in enumerate(draws.tolist()):
            for other in row:
                judge(at, texts[other], _equal_plainly(truths[at], truths[other]))
        return draws.size

    print(f"{options.data}: {len(truths):,} rows, kinds {dict(Counter(truth.kind for truth in truths))}")
    for name, check in (("itself", themselves), (f"{options.others} others", others), ("reworded", reworded)):
        before = len(wrong)
        count, speed = rate(check)
        print(f"{name}: {count:,} verifications, {len(wrong) - before} wrong, {speed:,.0f} a second")
    print(f"math-verify was {'started' if grader.runs else 'not started'}")
    _formulas(grader, 1)
    print(f"formulas: {rate(lambda: _formulas(grader, options.formulas))[1]:,.0f} a second")
    grader.close()
    for case in wrong[:20]:
        print("wrong:", json.dumps(case))
    sys.exit(1 if wrong else 0)


def _equal_plainly(one: Answer, other: Answer) -> bool:
    if one.amount is not None and other.amount is not None:
        return one.amount.value == other.amount.value
    return one.text == other.text


def _formulas(grader: Grader, count: int) -> int:
    """Compare formulas by math-verify."""
    for at in range(count):
        assert grader.equal(f"\\sqrt{{{at + 2}}} + x", f"x + \\sqrt{{{at + 2}}}")
    return count


if __name__ == "__main__":
    main()
