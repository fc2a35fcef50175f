"""Digests that engines must report after an update, computed from the tensors while they are sent."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.protocol.buckets import Bucket

DigestFunction = Callable[[Iterable[Tensor]], list[str]]

# dtypes of parameters as servers name them.
SERVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ROWS = 64  # SGLang pads the vocabulary with zeros to a multiple of it
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_WIDTH = 32  # on CPU, SGLang pads the width of feed-forward networks with zeros to a multiple of it
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_PART = re.compile(r"(.*\.)(q|k|v|gate|up)_proj(\.\w+)$")
_FUSED_PARTS = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "gate": ("gate_up", 0), "up": ("gate_up", 1)}


class ExpectedDigests:
    """Digests of the tensors of one version.

    Attributes:
        digests: tensor -> plain digest, if plain digests are computed.
        placed: tensor -> index of the bucket in which it was sent.
    """

    def __init__(self, plain: DigestFunction | None, fused: Iterable[str] = ()) -> None:
        """Start without tensors.

        Args:
            plain: computes the plain digests of tensors; None: there are none.
            fused: dtypes in which SGLang servers hold the weights; their checksums are computed for each.
        """
        self.digests: dict[str, str] = {}
        self.placed: dict[str, int] = {}
        self._plain = plain
        self._fused = {name: FusedDigests(SERVED_DTYPES[name]) for name in fused}

    def add_bucket(self, bucket: Bucket) -> None:
        """Add the tensors of a bucket, and note the bucket of each."""
        self.placed |= dict.fromkeys(bucket.names, bucket.index)
        self.add(dict(bucket.tensors()))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors, under their Hugging Face names."""
        if self._plain is not None:
            self.digests |= zip(tensors, self._plain(tensors.values()), strict=True)
        for fused in self._fused.values():
            for name, tensor in tensors.items():
                fused.add(name, tensor)

    def sglang(self, dtype: str) -> dict[str, str] | None:
        """Return SGLang's name -> checksum for a server that holds weights in `dtype`; None if it was not requested."""
        return self._fused[dtype].digests() if dtype in self._fused else None

    def changed_since(self, before: "ExpectedDigests") -> list[str]:
        """Return SGLang's names of the parameters whose plain digest changed, among tensors with a digest in both."""
        if self._plain is not before._plain:
            return []  # other engines were served then, and these are other numbers
        changed = [name for name, digest in self.digests.items() if before.digests.get(name, digest) != digest]
        return sorted({fused_place(name)[0] for name in changed})

    def where(self, name: str) -> str:
        """Return a text with `name` and the buckets in which the tensor or its parts were sent."""
        found = sorted({bucket for sent, bucket in self.placed.items() if name in (sent, fused_place(sent)[0])})
        return f"tensor '{name}'" + (f" (bucket {', '.join(map(str, found))})" if found else "")


@dataclass(slots=True)
class _Fusion:
    digest: Any = field(default_factory=hashlib.sha256)
    ahead: dict[int, Tensor] = field(default_factory=dict)  # parts that were added before an earlier part
    done: int = 0


class FusedDigests:
    """The checksums of SGLang's `/weights_checker` for an unquantized server on CPU with one rank.

    SGLang fuses projections along their rows. Its checksum is the first 8 bytes of the SHA-256 of a parameter's bytes.
    Parts may be added in any order and are hashed immediately. Only a part that is added before an earlier part is
    kept.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._fusions: dict[str, _Fusion] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, under its Hugging Face name."""
        place, at = fused_place(name)
        fusion = self._fusions.setdefault(place, _Fusion())
        values = _widened(name, tensor.detach().to(device="cpu", dtype=self._dtype)).contiguous()
        fusion.ahead[at] = values if at == fusion.done else values.clone()
        while fusion.done in fusion.ahead:
            ready = fusion.ahead.pop(fusion.done)
            fusion.digest.update(ready.reshape(-1).view(torch.uint8).numpy().data)
            fusion.done += 1
        if name.endswith(_VOCABULARY):
            fusion.digest.update(bytes(-len(values) % _ROWS * values[0].nbytes))

    def digests(self) -> dict[str, str]:
        """Return SGLang's name -> checksum, 16 hexadecimal digits."""
        return {name: fusion.digest.hexdigest()[:16] for name, fusion in self._fusions.items()}


def _widened(name: str, weight: Tensor) -> Tensor:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return F.pad(weight, (0, 0, 0, -len(weight) % _WIDTH))
    if name.endswith("down_proj.weight"):
        return F.pad(weight, (0, -weight.shape[1] % _WIDTH))
    return weight


def fused_place(name: str) -> tuple[str, int]:
    """Return SGLang's name of the parameter that holds a Hugging Face tensor, and the index of the tensor in it."""
    expert = _EXPERT.match(name)
    if expert is not None:
        prefix, number, kind = expert.groups()
        return (
            (f"{prefix}.w2_weight", int(number))
            if kind == "down"
            else (f"{prefix}.w13_weight", 2 * int(number) + (kind == "up"))
        )
    part = _PART.match(name)
    if part is None:
        return name, 0
    fused, at = _FUSED_PARTS[part[2]]
    return f"{part[1]}{fused}_proj{part[3]}", at


def first_difference(held: Mapping[str, str], expected: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the first tensor that is not as expected, and the difference as text; None if there is none.

    A name that is held but not expected is a difference, unless its digest is that of an expected tensor: a tied tensor
    may be listed twice.
    """
    for name, digest in expected.items():
        if held.get(name) != digest:
            found = f"digest {held[name]}" if name in held else "no such tensor"
            return name, f"should have digest {digest}, the engine has {found}"
    copies = set(expected.values())
    for name, digest in held.items():
        if name not in expected and digest not in copies:
            return name, "is held by the engine, but was not sent and may be stale"
    return None
