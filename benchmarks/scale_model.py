"""The time of a step on paper: a sum of terms, each a formula of sizes and coefficients.

A term is marked by what its coefficients are worth at its size: nothing where all were measured at that size, `~` where
a measured one is extrapolated, `?` where one is read from a public source or assumed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

FILE = Path(__file__).with_name("scale.json")
KINDS = ("measured", "read", "assumed")
STATE_BYTES = 16  # of a parameter in a checkpoint: weight, master weight, two moments
GRADIENT_BYTES = 6  # of a parameter on the wire of an update: fp32 gradients reduced, bf16 weights gathered


@dataclass(frozen=True)
class Coefficient:
    """A number that the formulas need.

    Attributes:
        value: the number.
        unit: its unit.
        kind: measured, read or assumed.
        source: where it was measured or read, or of what it is assumed.
        size: what it was measured over: `engines` or `ranks`; empty if it was not measured.
        up_to: the largest size at which it was measured.
    """

    value: float
    unit: str
    kind: str
    source: str
    size: str = ""
    up_to: int = 0


def read_coefficients(path: Path = FILE) -> dict[str, Coefficient]:
    """Return the coefficients of a file by their names."""
    return {name: Coefficient(**one) for name, one in json.loads(path.read_text(encoding="utf-8")).items()}


@dataclass(frozen=True)
class Work:
    """The model and the batch of a step. The defaults are 30B-A3B in bfloat16 and 16 samples for each prompt.

    Attributes:
        prompts: prompts of a step.
        samples: responses of a prompt.
        mean_tokens: mean length of a response.
        longest: length of the longest response.
        parameters: parameters of the model.
        active: parameters that a token uses.
        weight_bytes: bytes of a weight on the wire.
        tensors: tensors of the model.
        layers: layers with experts.
        experts: experts of a token in a layer.
        replays: routed experts come with the tokens (`rollout.routing_replay`).
        passes: forward passes over the batch besides the one with gradients.
        model_parallel: ranks that hold one copy of the model.
        engine_gpus: GPUs of an engine.
        bucket_bytes: bytes of a bucket (`rollout.bucket_mb`).
        save_every: steps from one checkpoint to the next.
    """

    prompts: int
    samples: int = 16
    mean_tokens: int = 4096
    longest: int = 16384
    parameters: float = 30.5e9
    active: float = 3.3e9
    weight_bytes: int = 2
    tensors: int = 18_867
    layers: int = 48
    experts: int = 8
    replays: bool = False
    passes: int = 1
    model_parallel: int = 8
    engine_gpus: int = 4
    bucket_bytes: float = 256 * 2**20
    save_every: int = 20

    @property
    def tokens(self) -> int:
        """Response tokens of a step."""
        return self.prompts * self.samples * self.mean_tokens

    @property
    def wire_bytes(self) -> float:
        """Bytes of all weights on the wire."""
        return self.parameters * self.weight_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in a batch: id, mask, version, logmu, and routed experts."""
        return 16 + (4 * self.layers * self.experts if self.replays else 0)


@dataclass(frozen=True)
class Sizes:
    """GPUs of the trainer (one rank each), GPUs of the engines, and engines."""

    ranks: int
    rollout_gpus: int
    engines: int

    @classmethod
    def of(cls, gpus: int, work: Work) -> "Sizes":
        """Return half of the GPUs for the trainer and half for engines."""
        half = gpus // 2
        return cls(half, half, max(1, half // work.engine_gpus))


@dataclass(frozen=True)
class Term:
    """A part of a step: seconds, and the names of the coefficients in it."""

    seconds: float
    uses: tuple[str, ...]


CONTROL_CALLS = 7  # of an update to each engine, besides one a bucket: look, hold, pause, begin, end, confirm, resume


def terms(c: Mapping[str, Coefficient], work: Work, at: Sizes) -> dict[str, Term]:
    """Return the parts of a step.

    Args:
        c: the coefficients.
        work: model and batch.
        at: the cluster.
    """

    def term(seconds: Callable[..., float], *uses: str) -> Term:
        return Term(seconds(*(c[name].value for name in uses)), uses)

    tokens, wire, copy = work.tokens, work.wire_bytes, work.parameters
    each = min(at.ranks, work.model_parallel)  # ranks of a replica
    replicas = math.ceil(at.ranks / each)
    shares = (replicas - 1 + math.ceil(math.log2(each))) / replicas  # sent by rank 0, then on inside a replica
    flops = (6 + 2 * work.passes) * work.active * tokens
    buckets = math.ceil(wire / work.bucket_bytes)
    return {
        "generate": term(lambda rate: tokens / (at.rollout_gpus * rate), "generate_rate"),
        "tail": term(lambda token_s: work.longest * token_s, "token_s"),
        "ingest": term(lambda client_s: tokens * client_s, "client_s"),
        "batch": term(lambda bw: (1 + work.passes) * tokens * work.token_bytes * shares / bw, "batch_bw"),
        "train": term(
            lambda peak, mfu, bubble: flops / (at.ranks * peak * mfu * (1 - bubble)), "peak_flops", "mfu", "bubble"
        ),
        "reduce": term(lambda bw: GRADIENT_BYTES * copy / work.model_parallel / bw, "link_bw"),
        "export": term(lambda bw, tensor_s: wire / bw + work.tensors * tensor_s, "link_bw", "tensor_s"),
        "send": term(lambda bw, bucket_s: wire / bw + buckets * bucket_s, "broadcast_bw", "bucket_s"),
        "control": term(lambda call_s: (CONTROL_CALLS + buckets) * at.engines * call_s, "control_s"),
        "confirm": term(lambda bw, probe_s: wire / bw + probe_s, "hash_bw", "probe_s"),
        "save": term(lambda bw: STATE_BYTES * copy / (at.ranks * bw) / work.save_every, "copy_bw"),
    }


def disk_sync(c: Mapping[str, Coefficient], work: Work, at: Sizes) -> Term:
    """Return the time to send the weights through a shared folder, in place of `send`.

    Args:
        c: the coefficients.
        work: model and batch.
        at: the cluster.
    """
    wire = work.wire_bytes
    seconds = wire / c["write_bw"].value + at.engines * wire / c["read_bw"].value
    return Term(seconds, ("write_bw", "read_bw"))


def background_save(c: Mapping[str, Coefficient], work: Work) -> Term:
    """Return the time that a checkpoint is written beside the steps. It must be less than the time between two."""
    return Term(STATE_BYTES * work.parameters / c["save_bw"].value, ("save_bw",))


SYNC = ("export", "send", "control", "confirm")
LEARN = ("batch", "train", "reduce")


def step_seconds(parts: Mapping[str, Term], *, overlaps: bool) -> float:
    """Return the seconds of a step.

    Args:
        parts: the result of `terms`.
        overlaps: rollouts of the next step run beside training (`rollout.max_staleness` of 1 or more).
    """
    s = {name: part.seconds for name, part in parts.items()}
    generation = max(s["generate"] + s["tail"], s["ingest"])
    learning, rest = sum(s[name] for name in LEARN), sum(s[name] for name in SYNC) + s["save"]
    return (max(generation, learning) if overlaps else generation + learning) + rest


def mark(c: Mapping[str, Coefficient], part: Term, at: Sizes) -> str:
    """Return what a term is worth at this size: empty, `~` or `?`.

    Args:
        c: the coefficients.
        part: the term.
        at: the cluster.
    """
    used = [c[name] for name in part.uses]
    if any(one.kind != "measured" for one in used):
        return "?"
    return "~" if any(getattr(at, one.size) > one.up_to for one in used) else ""


def first_excess(
    c: Mapping[str, Coefficient], share: float, sizes: tuple[int, ...], work: Work
) -> Iterator[tuple[int, str]]:
    """Yield terms in the order in which they exceed a share of an overlapped step, with the size at which they do.

    Args:
        c: the coefficients.
        share: share of the step.
        sizes: numbers of GPUs, rising.
        work: what a step is for; its prompts are replaced by one for every two GPUs.
    """
    seen: set[str] = set()
    for gpus in sizes:
        step = replace(work, prompts=gpus // 2)
        parts = terms(c, step, Sizes.of(gpus, step))
        whole = step_seconds(parts, overlaps=True)
        for name, part in sorted(parts.items(), key=lambda pair: -pair[1].seconds):
            if name not in seen and part.seconds > share * whole:
                seen.add(name)
                yield gpus, name
