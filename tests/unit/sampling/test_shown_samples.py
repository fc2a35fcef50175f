"""The samples of a step are its first prompts, with all their responses, as text."""

import json
import math

from megatron_rl.sampling.group import Group
from megatron_rl.sampling.shown_samples import decode_samples, keep_samples
from tests.trajectories import make_trajectory
from tests.unit.tasks.char_tokenizer import char_tokenizer


def group(number: int, tokenizer) -> Group:
    prompt, responses = tokenizer("1+2=")["input_ids"], ("3", "12")
    made = [
        make_trajectory(
            2 * number + at,
            number,
            prompt,
            [*tokenizer(text)["input_ids"], tokenizer.eos_token_id],
            1.0 - at,
            prompt_id=f"p{number}",
        )
        for at, text in enumerate(responses)
    ]
    return Group(made)


def test_the_first_prompts_are_kept_with_all_their_responses():
    tokenizer = char_tokenizer("0123456789+=")
    kept = keep_samples([group(4, tokenizer), group(6, tokenizer), group(7, tokenizer)], 2)
    rows = decode_samples(json.loads(json.dumps(kept)), 3, tokenizer, {8: 0.5, 12: math.inf})
    assert [(row.step, row.trajectory, row.prompt_id, row.reward, row.tokens) for row in rows] == [
        (3, 8, "p4", 1.0, 2),
        (3, 9, "p4", 0.0, 3),
        (3, 12, "p6", 1.0, 2),
        (3, 13, "p6", 0.0, 3),
    ]
    assert [row.k3 for row in rows] == [0.5, None, None, None]
    assert rows[1].prompt.split() == ["1", "+", "2", "="]
    assert rows[1].response.split() == ["1", "2", tokenizer.eos_token]
    assert keep_samples([group(4, tokenizer)], 0) == [] and decode_samples([], 3, tokenizer, {}) == []
