"""What every objective inherits: masking, packing, splitting, checking."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, LossNorm, make_objective

MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
OBJECTIVES = [{"name": "drpo", "delta": 0.15}, {"name": "grpo", "dual_clip": 3.0}]
both = pytest.mark.parametrize("spec", OBJECTIVES, ids=lambda spec: spec["name"])
HORIZON = 9


def batch(seed: int, lengths: list[int]) -> LossInputs:
    """Right-padded float64 inputs with `lengths` trained tokens a row (some rows may have none)."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max([*lengths, 1]))
    logp = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
    return LossInputs(
        logp=logp,
        logmu=logp + 0.5 * torch.randn(shape, generator=g, dtype=torch.float64),
        advantages=torch.randn(len(lengths), generator=g, dtype=torch.float64),
        mask=(torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).double(),
    )


def packed(x: LossInputs, order: list[int], ids: list[int], padding: int) -> tuple[LossInputs, torch.Tensor]:
    """The trained tokens of rows `order` in one row, and where each came from in the flat padded tensor."""
    source = torch.cat([(x.mask[row] > 0).nonzero()[:, 0] + row * x.mask.shape[1] for row in order])
    advantages = x.advantages[:, None].expand_as(x.logp)

    def row(t: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(t.flatten()[source], (0, padding), value=fill)[None]

    seq_ids = torch.tensor([[ids[s // x.mask.shape[1]] for s in source.tolist()] + [-1] * padding])
    nan = float("nan")
    return LossInputs(row(x.logp, nan), row(x.logmu, nan), row(advantages, nan), row(x.mask, 0), seq_ids=seq_ids), source


def gradient(objective, x: LossInputs) -> tuple[float, torch.Tensor]:
    logp = x.logp.clone().requires_grad_()
    loss = objective(replace(x, logp=logp)).loss
    loss.backward()
    return loss.item(), logp.grad


@both
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), data=st.data())
def test_packed_inputs_give_the_loss_and_gradient_of_padded_ones(spec, mode, seed, lengths, data):
    x = batch(seed, lengths)
    objective = make_objective({**spec, "norm": {"mode": mode, "horizon": HORIZON}})
    order = data.draw(st.permutations(range(len(lengths))))
    ids = data.draw(st.lists(st.integers(0, 10**12), min_size=len(lengths), max_size=len(lengths), unique=True))
    y, source = packed(x, order, ids, padding=data.draw(st.integers(0, 4)))
    loss, grad = gradient(objective, x)
    packed_loss, packed_grad = gradient(objective, y)
    assert packed_loss == pytest.approx(loss, rel=1e-12, abs=1e-13)
    torch.testing.assert_close(packed_grad[0, : len(source)], grad.flatten()[source])
    assert not packed_grad[0, len(source) :].any()


@both
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any),
    cut=st.integers(1, 5),
    as_tensor=st.booleans(),
)
def test_losses_and_metrics_of_micro_batches_add_up_to_those_of_the_batch(spec, mode, seed, lengths, cut, as_tensor):
    x = batch(seed, lengths)
    counts = (sum(lengths), sum(n > 0 for n in lengths))
    tokens, sequences = (torch.tensor(n) for n in counts) if as_tensor else counts
    norm = LossNorm(mode, tokens=tokens, sequences=sequences, horizon=HORIZON)
    objective = make_objective(spec)
    whole, whole_grad = objective(replace(x, norm=norm)), gradient(objective, replace(x, norm=norm))[1]
    unaided = objective(replace(x, norm=LossNorm(mode, horizon=HORIZON)))
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        part = LossInputs(x.logp[rows], x.logmu[rows], x.advantages[rows], x.mask[rows], norm=norm)
        if len(part.logp):
            parts.append((objective(part), gradient(objective, part)[1]))
    assert whole.loss.item() == pytest.approx(unaided.loss.item(), rel=1e-12, abs=1e-13)
    assert sum(out.loss.item() for out, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-13)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_grad)
    for name, value in whole.metrics.items():
        assert sum(out.metrics[name].item() for out, _ in parts) == pytest.approx(value.item(), rel=1e-12, abs=1e-13)


@both
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_tokens_contribute_exact_zeros_whatever_they_hold(spec, garbage):
    x = batch(0, [3, 5, 1])
    dirty = replace(
        x,
        logp=torch.where(x.mask > 0, x.logp, garbage),
        logmu=torch.where(x.mask > 0, x.logmu, garbage),
        advantages=torch.where(x.mask > 0, x.advantages[:, None], garbage),
    )
    objective = make_objective(spec)
    loss, grad = gradient(objective, dirty)
    out = objective(dirty)
    assert loss == gradient(objective, x)[0]
    for tensor in (grad, out.loss_tok, out.weight_tok):
        assert (tensor[x.mask == 0] == 0).all()


@both
def test_zero_advantages_give_exact_zeros(spec):
    x = batch(1, [4, 4])
    loss, grad = gradient(make_objective(spec), replace(x, advantages=torch.zeros(2, dtype=torch.float64)))
    assert loss == 0
    assert not grad.any()


@both
def test_one_advantage_a_sequence_is_the_same_as_one_a_token(spec):
    x = batch(2, [4, 2])
    spread = replace(x, advantages=x.advantages[:, None].expand_as(x.logp))
    assert make_objective(spec)(x).loss.item() == make_objective(spec)(spread).loss.item()


@both
def test_the_loss_keeps_the_precision_of_logp(spec):
    x = batch(3, [4, 2])
    single = LossInputs(x.logp.float(), x.logmu.float(), x.advantages, x.mask.bool())
    assert make_objective(spec)(single).loss.dtype == torch.float32
    assert make_objective(spec)(x).loss.dtype == torch.float64


@both
def test_log_ratios_are_clamped_so_that_the_loss_stays_finite(spec):
    x = LossInputs(torch.zeros(1, 2), torch.tensor([[-500.0, -1e4]]), torch.tensor([1.0]), torch.ones(1, 2))
    assert make_objective(spec)(x).loss.isfinite()
    assert x.log_ratio().tolist() == [[20.0, 20.0]]


def test_a_norm_on_the_inputs_overrides_the_one_of_the_objective():
    x = batch(4, [4, 2])
    by_inputs = make_objective({"name": "drpo"})(replace(x, norm=LossNorm("token_mean")))
    by_objective = make_objective({"name": "drpo", "norm": "token_mean"})(x)
    assert by_inputs.loss.item() == by_objective.loss.item()


def test_an_empty_micro_batch_is_zero_when_the_global_count_is_known():
    x = batch(5, [0, 0])
    loss, grad = gradient(make_objective({"name": "drpo"}), replace(x, norm=LossNorm("token_mean", tokens=10)))
    assert loss == 0
    assert not grad.any()


def test_an_empty_mask_without_a_global_count_is_refused():
    with pytest.raises(UserError, match="mask selects no token"):
        make_objective({"name": "drpo"})(batch(5, [0, 0]))


@pytest.mark.parametrize("name", ["logp", "logmu", "advantages"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_tensor_and_position(name, value):
    x = batch(6, [3, 3])
    tensor = getattr(x, name).clone()
    tensor.view(2, -1)[1, 0] = value
    with pytest.raises(UserError, match=rf"{name}\[1, 0\] is {value}"):
        replace(x, **{name: tensor}).validated()
    with pytest.raises(UserError, match=name):
        make_objective({"name": "drpo"})(replace(x, **{name: tensor}))


def test_malformed_tensors_are_refused_by_name():
    x = batch(7, [3, 3])
    for change, message in [
        ({"logmu": x.logmu[:, :2]}, "logmu has shape"),
        ({"logp": x.logp[0]}, "logp has shape"),
        ({"mask": x.mask[:1]}, "mask has shape"),
        ({"mask": 0.5 * x.mask}, "mask holds values"),
        ({"advantages": x.advantages[:1]}, "advantages has shape"),
        ({"logmu": x.logmu.bfloat16()}, "logmu is torch.bfloat16"),
        ({"seq_ids": torch.zeros(2, 3, dtype=torch.long)}, "packed"),
    ]:
        with pytest.raises(UserError, match=message):
            make_objective({"name": "drpo"})(replace(x, **change))


def test_packed_inputs_are_refused_without_horizon_or_with_one_advantage_a_row_or_trained_padding():
    x, _ = packed(batch(8, [3, 2]), [0, 1], [7, 3], padding=1)
    objective = make_objective({"name": "drpo"})
    with pytest.raises(UserError, match="horizon"):
        objective(x)
    norm = LossNorm("token_mean")
    with pytest.raises(UserError, match="one value a token"):
        objective(replace(x, norm=norm, advantages=torch.zeros(1)))
    with pytest.raises(UserError, match="padding"):
        objective(replace(x, norm=norm, mask=torch.ones_like(x.mask)))


@pytest.mark.parametrize("keys", [{"tokens": 0}, {"sequences": -1}, {"horizon": "8"}, {"mode": "mean"}])
def test_an_illegal_norm_is_refused(keys):
    with pytest.raises(ConfigError, match="norm"):
        LossNorm(**{"mode": "token_mean", **keys})
