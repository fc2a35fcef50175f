"""Every objective inherits masking, packing, splitting and input checks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import OBJECTIVES, LossInputs, LossNorm, make_objective
from tests.unit.objectives.specs import (
    HORIZON,
    MODES,
    SPECS,
    batch,
    every_objective,
    f64,
    gradient,
    mapped,
    only_needed,
    packed,
    trained,
)

sizes = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
seeds = st.integers(0, 10**6)


def test_the_table_holds_every_objective():
    assert {spec.options["name"] for spec in SPECS} == set(OBJECTIVES)


@every_objective
@settings(max_examples=15)
@given(seed=seeds, lengths=sizes, mode=st.sampled_from(MODES), data=st.data())
def test_packed_inputs_give_the_loss_and_gradient_of_padded_ones(spec, seed, lengths, mode, data):
    objective = spec.make(norm={"mode": mode, "horizon": HORIZON})
    x = only_needed(objective, batch(seed, lengths))
    source = trained(x, data.draw(st.permutations(range(len(lengths)))))
    ids = data.draw(st.lists(st.integers(0, 10**12), min_size=len(lengths), max_size=len(lengths), unique=True))
    loss, grad = gradient(objective, x)
    packed_loss, packed_grad = gradient(objective, packed(x, source, ids, padding=data.draw(st.integers(0, 4))))
    assert packed_loss == pytest.approx(loss, rel=1e-10, abs=1e-11)
    torch.testing.assert_close(packed_grad[0, : len(source)], grad.flatten(0, 1)[source], rtol=1e-10, atol=1e-11)
    assert not packed_grad[0, len(source) :].any()


@every_objective
@settings(max_examples=15)
@given(seed=seeds, lengths=sizes, mode=st.sampled_from(MODES), cut=st.integers(0, 5), as_tensor=st.booleans())
def test_losses_and_metrics_of_micro_batches_add_up_to_those_of_the_batch(spec, seed, lengths, mode, cut, as_tensor):
    objective = spec.make(kl_coef=0.1, entropy_coef=0.01)
    x = only_needed(objective, batch(seed, lengths))
    counts = (sum(lengths), sum(n > 0 for n in lengths))
    tokens, sequences = (torch.tensor(n) for n in counts) if as_tensor else counts
    x = replace(x, norm=LossNorm(mode, tokens=tokens, sequences=sequences, horizon=HORIZON))
    whole, whole_grad = objective(x), gradient(objective, x)[1]
    unaided = objective(replace(x, norm=LossNorm(mode, horizon=HORIZON)))
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        part = mapped(x, lambda _, tensor: tensor[rows])  # noqa: B023  # called immediately
        if len(part.logp):
            parts.append((objective(part), gradient(objective, part)[1]))
    assert whole.loss.item() == pytest.approx(unaided.loss.item(), rel=1e-11, abs=1e-12)
    assert sum(out.loss.item() for out, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-11, abs=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_grad, rtol=1e-11, atol=1e-12)
    for name, value in whole.metrics.items():
        assert sum(out.metrics[name].item() for out, _ in parts) == pytest.approx(value.item(), rel=1e-11, abs=1e-12)


@every_objective
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_tokens_contribute_exact_zeros_whatever_they_hold(spec, garbage):
    objective = spec.make(kl_coef=0.1, entropy_coef=0.1)
    x = only_needed(objective, batch(0, [3, 5, 1]))
    x = replace(x, mask=x.mask * f64([1, 0, 1, 1, 1]))  # a gap within a response, as for tool output

    def dirty(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "mask":
            return tensor
        keep = x.mask.bool() if tensor.ndim < 3 else x.mask.bool()[..., None]
        return torch.where(keep, tensor[:, None] if tensor.ndim == 1 else tensor, garbage)

    loss, grad = gradient(objective, mapped(x, dirty))
    out = objective(mapped(x, dirty))
    assert loss == gradient(objective, x)[0]
    assert (out.weight_tok is not None) == spec.weight
    for tensor in (grad, out.loss_tok, *([out.weight_tok] if spec.weight else [])):
        assert (tensor[x.mask == 0] == 0).all()


@every_objective
def test_zero_advantages_give_exact_zeros(spec):
    if not spec.advantages:
        pytest.skip("this method does not look at advantages")
    x = replace(batch(1, [4, 4]), advantages=torch.zeros(2, dtype=torch.float64))
    loss, grad = gradient(spec.make(), x)
    assert loss == 0
    assert not grad.any()


@every_objective
def test_one_value_a_sequence_is_the_same_as_one_a_token(spec):
    x = batch(2, [4, 2])
    spread = mapped(x, lambda _, t: t[:, None].expand_as(x.logp) if t.ndim == 1 else t)
    assert spec.make()(x).loss.item() == spec.make()(spread).loss.item()


@every_objective
def test_the_loss_keeps_the_precision_of_logp(spec):
    x = batch(3, [4, 2])
    out = spec.make()(mapped(x, lambda name, t: t.bool() if name == "mask" else t.float()))
    assert out.loss.dtype == out.loss_tok.dtype == torch.float32
    assert spec.make()(x).loss.dtype == torch.float64
    torch.testing.assert_close(out.loss.double(), spec.make()(x).loss, rtol=1e-4, atol=1e-5)


@every_objective
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_the_loss_stays_finite_however_far_the_policies_are_apart(spec, sign, advantage):
    near, far = torch.full((1, 2), -1e-7), torch.tensor([[-80.0, -1e4]])
    pi, others = (near, far) if sign > 0 else (far, near)
    topk = tuple(t[..., None] for t in (pi, others))
    x = LossInputs(pi, others, torch.tensor([advantage]), torch.ones(1, 2), others, others, torch.ones(1), topk=topk)
    x = replace(x, staleness=torch.zeros(1, 2))
    loss, grad = gradient(spec.make(kl_coef=0.1), x)
    assert torch.tensor(loss).isfinite()
    assert grad.isfinite().all()
    assert x.log_ratio().tolist() == [[20.0 * sign, 20.0 * sign]]


@every_objective
@pytest.mark.parametrize("packing", [False, True])
def test_no_objective_reads_a_value_back_which_would_stall_a_gpu(spec, packing):
    objective = spec.make(kl_coef=0.1, entropy_coef=0.1, norm={"horizon": HORIZON})
    x = only_needed(objective, batch(4, [4, 2]))
    if packing:
        x = packed(x, trained(x, [0, 1]), [7, 3], padding=2)
    # Meta tensors have shapes but no values, so that reading a value is an error.
    x = mapped(x, lambda _, tensor: tensor.to("meta"))
    logp = x.logp.requires_grad_()
    objective(replace(x, logp=logp)).loss.backward()
    assert logp.grad is not None


@every_objective
def test_a_missing_tensor_is_refused_by_name_and_an_unneeded_one_is_never_touched(spec):
    objective = spec.make()
    x = batch(5, [3, 3])
    for name in objective.needs:
        with pytest.raises(UserError, match=f"needs '{name}'"):
            objective(replace(x, **{name: None}))
    touched = {*objective.needs, "logp", "advantages", "mask"}
    useless = mapped(x, lambda name, tensor: tensor if name in touched else torch.full_like(tensor, float("nan")))
    assert objective(useless).loss.item() == objective(only_needed(objective, x)).loss.item()


@every_objective
def test_only_what_is_needed_has_to_be_given(spec):
    objective, x = spec.make(), batch(5, [3, 3])
    given = {name: getattr(x, name) for name in ("logp", "mask", *objective.needs)}
    if objective.uses_advantages:
        with pytest.raises(UserError, match="needs 'advantages'"):
            objective(LossInputs(**given))
        given["advantages"] = x.advantages
    assert objective(LossInputs(**given)).loss.item() == objective(x).loss.item()
    with pytest.raises(UserError, match="mask is missing"):
        objective(LossInputs(**{**given, "mask": None}))


@pytest.mark.parametrize("wrong", ["one", "single", "flat", "half"])
def test_a_malformed_top_k_is_refused(wrong):
    x = batch(5, [3, 3])
    logp, logmu = x.topk
    given = {"one": logp, "single": (logp,), "flat": (logp[..., 0], logmu[..., 0]), "half": (logp.half(), logmu.half())}
    with pytest.raises(UserError, match="topk"):
        make_objective({"name": "dppo_topk"})(replace(x, topk=given[wrong]))


@pytest.mark.parametrize("spec", ["drpo", None, {"name": ["drpo"]}, [("name", "drpo")]])
def test_an_objective_is_asked_for_by_a_mapping_with_a_name(spec):
    with pytest.raises(ConfigError):
        make_objective(spec)


@every_objective
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_tensor_and_position(spec, value):
    objective = spec.make()
    x = batch(6, [3, 3])
    for name in {*objective.needs, "logp", "advantages"}:

        def spoiled(which: str, tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            tensor = tensor.clone()
            if which == name:
                tensor.view(2, -1)[1, 0] = value
            return tensor

        with pytest.raises(UserError, match=rf"{name}.*\[1, 0\] is {value}"):
            objective(mapped(x, spoiled))


@every_objective
def test_malformed_tensors_are_refused_by_name(spec):
    objective = spec.make()
    x = batch(7, [3, 3])
    bad = [
        ({"logp": x.logp[0]}, "logp has shape"),
        ({"logp": x.logp.bfloat16()}, "logp is torch.bfloat16"),
        ({"mask": x.mask[:1]}, "mask has shape"),
        ({"mask": 0.5 * x.mask}, "mask holds values"),
        ({"advantages": x.advantages[:1]}, "advantages has shape"),
        ({"seq_ids": torch.zeros(2, 3, dtype=torch.long)}, "packed"),
    ]
    for name in objective.needs & {"logmu", "logold", "logref"}:
        tensor = getattr(x, name)
        bad += [({name: tensor[:, :2]}, f"{name} has shape"), ({name: tensor.bfloat16()}, f"{name} is torch.bfloat16")]
    if "rewards" in objective.needs:
        bad.append(({"rewards": x.logp[:, :2]}, "rewards has shape"))
    if "topk" in objective.needs:
        bad.append(({"topk": (x.topk[0], x.topk[1][..., :2])}, "topk holds a tensor of shape"))
    for change, message in bad:
        with pytest.raises(UserError, match=message):
            objective(replace(x, **change))


@every_objective
def test_an_empty_mask_is_refused_unless_the_global_counts_are_known(spec):
    x = batch(8, [0, 0])
    with pytest.raises(UserError, match="mask selects no token"):
        spec.make()(x)
    loss, grad = gradient(spec.make(), replace(x, norm=LossNorm(MODES[0], tokens=10, sequences=3)))
    assert loss == 0
    assert not grad.any()


@every_objective
def test_packed_inputs_are_refused_without_horizon_or_with_one_advantage_a_row_or_trained_padding(spec):
    x = batch(9, [3, 2])
    x = packed(x, trained(x, [0, 1]), [7, 3], padding=1)
    with pytest.raises(UserError, match="horizon"):
        spec.make(norm="seq_mean_token_sum_norm")(x)
    objective = spec.make(norm="token_mean")
    with pytest.raises(UserError, match="one value a token"):
        objective(replace(x, advantages=torch.zeros(1)))
    with pytest.raises(UserError, match="padding"):
        objective(replace(x, mask=torch.ones_like(x.mask)))


def test_a_norm_on_the_inputs_overrides_the_one_of_the_objective():
    x = batch(4, [4, 2])
    by_inputs = make_objective({"name": "drpo"})(replace(x, norm=LossNorm("token_mean")))
    by_objective = make_objective({"name": "drpo", "norm": "token_mean"})(x)
    assert by_inputs.loss.item() == by_objective.loss.item()


@pytest.mark.parametrize("keys", [{"tokens": 0}, {"sequences": -1}, {"horizon": "8"}, {"mode": "mean"}])
def test_an_illegal_norm_is_refused(keys):
    with pytest.raises(ConfigError, match="norm"):
        LossNorm(**{"mode": "token_mean", **keys})


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "20", None])
def test_an_illegal_whole_number_is_refused(bad):
    with pytest.raises(ConfigError, match=r"'top_k' is .* whole number"):
        make_objective({"name": "dppo_topk", "top_k": bad})
