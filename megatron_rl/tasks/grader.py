"""Comparison of two mathematical answers by math-verify, in a separate process.

A time limit inside a process is a signal. It works only in a main thread, and does not interrupt a calculation as
large as 9^(9^9). A separate process has a main thread and can be killed when it is stuck. When it runs out of memory,
the trainer continues. Requests and verdicts are JSON lines on its pipes.
"""

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

if __name__ != "__main__":  # the grader's own process need not find the package
    from megatron_rl.supervise import stops_blocked

READY = b"ready\n"
START_LIMIT_S = 120.0
CPU_LIMIT_S = 3
MEMORY_LIMIT_BYTES = 4 << 30
IRRATIONAL_TOLERANCE = 1e-6


class Grader:
    """Grader: compares answers in its process. Threads may share it.

    The process starts with the first comparison, and again after it had to be killed.

    Args:
        limit_s: time limit of one comparison in seconds, after which the verdict is "not equal".
    """

    def __init__(self, limit_s: float = 15.0) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._alive: list[subprocess.Popen[bytes]] = []  # at most one; a list, so that the finalizer can share it
        weakref.finalize(self, _stop_all, self._alive)

    def equal(self, gold: str, answer: str) -> bool:
        """Return True if math-verify finds the two answers (LaTeX or plain) equal.

        Return False also if it cannot read or decide them.
        """
        if not answer.strip():
            return False
        if answer.strip() == gold.strip():
            return True
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                process.stdin.flush()
                verdict = _read_line(process, self._limit_s)
            except BrokenPipeError:
                verdict = b""
            if verdict not in (b"true\n", b"false\n"):
                _stop_all(self._alive)
            return verdict == b"true\n"

    @property
    def runs(self) -> bool:
        """True if the process has been started and not closed."""
        return bool(self._alive)

    def close(self) -> None:
        with self._lock:
            _stop_all(self._alive)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._alive and self._alive[0].poll() is None:
            return self._alive[0]
        _stop_all(self._alive)
        # -P: the folder of this file holds a math.py, which must not shadow the standard library's.
        command = [sys.executable, "-P", __file__]
        with stops_blocked():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._alive.append(process)
        if _read_line(process, START_LIMIT_S) != READY:
            _stop_all(self._alive)
            raise RuntimeError(f"the answer grader did not start: {' '.join(command)}")
        return process


def _stop_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """Read one line of the process. Return a part of it if the time is up or the process has ended."""
    assert process.stdout is not None
    until, line = time.monotonic() + limit_s, b""
    while not line.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            break
        byte = process.stdout.read(1)
        if not byte:
            break
        line += byte
    return line


def _judge(gold: str, answer: str) -> bool:
    """Return whether two formulas are equal; False also if they cannot be read, or within the limit of CPU time."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutException

    # The library's own limit is wall-clock time, in which a busy machine may not even read an easy formula.
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT_S, 0.1)  # again and again: parsers catch exceptions
    try:
        return _equal(gold, answer)
    except (TimeoutException, ArithmeticError, TypeError, ValueError):
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _equal(gold: str, answer: str) -> bool:
    # math-verify finds the answer by its box. It returns [] or False for its own failures.
    parsed = [parse(f"\\boxed{{{text}}}", extraction, parsing_timeout=None) for text in (gold, answer)]
    if not all(parsed):
        return False
    expected, given = ([_exact(found) for found in side] for side in parsed)
    if all(getattr(side[0], "is_number", False) for side in (expected, given)):
        return _same_number(expected[0], given[0])
    return bool(verify(expected, given, timeout_seconds=None))


def _exact(found: Any) -> Any:
    """Return an expression with its decimals as fractions, so that two of them are equal only if they are the same."""
    floats = found.atoms(sympy.Float) if isinstance(found, sympy.Basic) else ()
    return found.xreplace({number: sympy.Rational(str(number)) for number in floats}) if floats else found


def _same_number(gold: Any, answer: Any) -> bool:
    """Return whether two constant expressions are equal; if one is irrational, within 1e-6 of its size."""
    difference = sympy.simplify(gold.doit() - answer.doit())
    if difference == 0:
        return True
    if not difference.is_finite or (difference.is_rational and gold.doit().is_rational):
        return False
    return bool(abs(difference.evalf(30)) <= IRRATIONAL_TOLERANCE * abs(gold.evalf(30)))


def _serve() -> None:
    """Answer requests from standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # What the parsers print must not be read as a verdict.
    out.write(READY)
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        out.write(b"true\n" if _judge(gold, answer) else b"false\n")


if __name__ == "__main__":
    # Here, because only this process compares answers, and the imports take 0.3 s.
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException
    from math_verify.parser import NormalizationConfig

    # The library's default takes the variables of `2ab` for a unit. `answers` reads units.
    plain = NormalizationConfig(True, False, True, True, "all", False)  # only units is not the default
    extraction = [
        LatexExtractionConfig(try_extract_without_anchor=True, boxed_match_priority=50, normalization_config=plain),
        ExprExtractionConfig(try_extract_without_anchor=True),
    ]

    _serve()
