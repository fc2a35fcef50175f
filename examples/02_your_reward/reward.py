"""Reward: the share of a response's digits that are larger than the one before, of as many as are wanted."""

from itertools import pairwise


def in_order(response, metadata):
    """Return the score of one response, and two metrics for the run log."""
    digits = [int(character) for character in response if character in "0123456789"]
    rising = sum(a < b for a, b in pairwise(digits))
    wanted = metadata["digits"]
    score = min(rising + bool(digits), wanted) / wanted
    return {"score": score, "digits": len(digits), "in_order": rising}
