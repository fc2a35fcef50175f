"""Log-probabilities and entropy over a vocabulary split by tensor parallelism are those of the whole softmax."""

import numpy as np
import pytest

from tests.parallel.score_steps import Case

LAYOUTS = {"tp2": {"tensor": 2}, "tp2_sp": {"tensor": 2, "sequence": True}}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [258, 259])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_scores_and_differentiates_the_whole_vocabulary(two_ranks, layout, vocab, temperature):
    expected = Case.make(vocab).reference(temperature, topk=True)
    # All rows at once; row by row; row by row, with the first few kept for backward.
    for chunk_bytes, kept_bytes in ((1 << 20, 0), (1, 0), (1, 5000)):
        results = two_ranks.run(
            "tests.parallel.score_steps",
            "scores",
            layout=layout,
            vocab=vocab,
            temperature=temperature,
            chunk_bytes=chunk_bytes,
            kept_bytes=kept_bytes,
        )
        for result in results:
            for name, value in expected.items():
                np.testing.assert_allclose(result[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)
