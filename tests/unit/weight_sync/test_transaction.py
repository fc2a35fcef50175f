"""An engine whose digests cannot be computed must hold other bytes for every tensor that changed, and score equally."""

from collections.abc import Sequence

import pytest
import torch

from megatron_rl.engines.control import Traits
from megatron_rl.errors import EngineError
from megatron_rl.weight_sync.confirmation import ScoreProbe
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transaction import Transaction, Version
from megatron_rl.weights.digest import device_digests

URL = "http://engine"
CODED = {
    "model.layers.0.mlp.down_proj.weight": 1,
    "model.layers.0.mlp.down_proj.weight_scale_inv": 2,
    "model.norm.weight": 3,
}
PLAIN = {"model.layers.0.mlp.down_proj.weight": 1, "model.norm.weight": 3}


class Holding:
    """An engine with given digests, which gives every token the same log-probability."""

    def __init__(self, digests: dict[str, str], logp: float) -> None:
        self.digests, self.logp = digests, logp

    def checksums(self, url: str) -> dict[str, str]:
        return self.digests

    def resume(self, url: str) -> None: ...

    def pause(self, url: str, mode: str) -> None: ...

    def score(self, url: str, tokens: Sequence[int]) -> list[float]:
        return [self.logp] * (len(tokens) - 1)


def tally_of(tensors: dict[str, int]) -> ExpectedDigests:
    tally = ExpectedDigests(plain=device_digests)
    tally.add({name: torch.tensor([float(value)]) for name, value in tensors.items()})
    return tally


def failures(
    sent: dict[str, int], before: dict[str, int], held: dict[str, str], *, quantized: bool, logp: float = -1.0
) -> str:
    """Return the error of an update from `before` to `sent`. Before it, the engine reported digest "old" for all."""
    old = Version(1, None, tally_of(before), {URL: dict.fromkeys(held, "old")})
    traits = {URL: Traits(embedded=False, ranks=1, device="cuda", dtype="bfloat16", quantized=quantized)}
    probe = ScoreProbe((5, 6, 7), (-1.0, -1.0), 0.05)
    update = Transaction(
        Holding(held, logp),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        tally_of(sent),
        2,
        old,
        traits=traits,
        probe=probe,
    )
    return str(update._confirm_by_probe().get(URL, ""))


@pytest.mark.parametrize(("tensors", "quantized"), [(PLAIN, False), (CODED, True)], ids=["plain", "codes"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_tensor_that_stayed_as_it_was_is_named(tensors: dict[str, int], quantized: bool, name: str) -> None:
    held = dict.fromkeys(tensors, "new") | {name: "old"}
    sent = {each: value + 10 for each, value in tensors.items()}
    assert f"tensor '{name}' was sent with new values" in failures(sent, tensors, held, quantized=quantized)
    assert failures(sent | {name: tensors[name]}, tensors, held, quantized=quantized) == "", (
        "what is sent again may stay"
    )


def test_an_engine_that_quantizes_what_it_is_sent_may_lose_a_small_change() -> None:
    held = dict.fromkeys(PLAIN, "old")
    assert failures({name: value + 10 for name, value in PLAIN.items()}, PLAIN, held, quantized=True) == ""


def test_whatever_it_holds_an_engine_that_scores_otherwise_than_the_trainer_is_refused() -> None:
    held = dict.fromkeys(PLAIN, "new")
    assert "are off by 0.1 on average, 0.05 is allowed" in failures(PLAIN, PLAIN, held, quantized=False, logp=-1.1)
    assert "are off by nan" in failures(PLAIN, PLAIN, held, quantized=False, logp=float("nan"))


def test_engines_of_one_kind_that_hold_different_weights_are_told_apart() -> None:
    traits = Traits(embedded=False, ranks=1, device="cuda", dtype="bfloat16", quantized=False)

    class Two(Holding):
        def checksums(self, url: str) -> dict[str, str]:
            return dict.fromkeys(PLAIN, "new") | ({"model.norm.weight": "other"} if url == "http://b" else {})

    both = {"http://a": traits, "http://b": traits}
    old = Version(1, None, tally_of(PLAIN), {})
    update = Transaction(Two({}, -1.0), None, tally_of(PLAIN), 2, old, traits=both)  # type: ignore[arg-type]
    failed = update._confirm_by_probe()
    assert failed.keys() == {"http://b"} and isinstance(failed["http://b"], EngineError)
    assert "model.norm.weight" in str(failed["http://b"]) and "compared with http://a" in str(failed["http://b"])
