"""Host lists as Slurm writes them: `n[01-03,7],gpu-[1-2]-[a]`."""

import re
from typing import List

MOST_HOSTS = 100000
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_hosts(text: str) -> List[str]:
    """Return the hosts of a list in the order written. Numbers keep their zeros.

    Raises:
        ValueError: the brackets do not match, a range is not two numbers, or there are more than 100000 hosts.
    """
    hosts: List[str] = []
    for part in _split_outside_brackets(text.strip()):
        hosts += _expand_part(part, text)
        if len(hosts) > MOST_HOSTS:
            raise ValueError("the host list %r has more than %d hosts" % (text[:80], MOST_HOSTS))
    return hosts


def _split_outside_brackets(text: str) -> List[str]:
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ValueError("the brackets of the host list %r do not match" % text[:80])
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth:
        raise ValueError("the brackets of the host list %r do not match" % text[:80])
    parts.append(text[start:])
    return [part for part in parts if part]


def _expand_part(part: str, text: str) -> List[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [head]
    inside, _, tail = rest.partition("]")
    numbers: List[str] = []
    for one in inside.split(","):
        match = _RANGE.fullmatch(one)
        if match is None:
            raise ValueError("the host list %r has %r between brackets, which is no range" % (text[:80], one))
        first, last = match.group(1), match.group(2) or match.group(1)
        if not 0 <= int(last) - int(first) < MOST_HOSTS:
            raise ValueError("the host list %r has the range %r, which is empty or too long" % (text[:80], one))
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    tails = _expand_part(tail, text)
    if len(numbers) * len(tails) > MOST_HOSTS:
        raise ValueError("the host list %r has more than %d hosts" % (text[:80], MOST_HOSTS))
    return [head + number + end for number in numbers for end in tails]


def expand_counts(text: str) -> List[int]:
    """Return tasks per node from Slurm's short form: `4(x2),3` is [4, 4, 3]. Raises ValueError."""
    counts: List[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError("%r is no list of tasks per node, such as 4(x2),3" % text[:80])
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts
