"""Float16 training uses a loss scale, and log-probabilities can come from a float32 product."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.errors import CheckpointError, PrecisionError
from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy, UpdateStats
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.logprobs import _Float32Head, _Head, token_scores
from megatron_rl.policy.optimizer import GROWTH_INTERVAL, INITIAL_SCALE, MAX_SCALE
from tests.models import make_qwen3
from tests.parallel.alp_steps import alp_policy, sigmas
from tests.parallel.refusal_steps import digest
from tests.parallel.score_steps import Case
from tests.parallel.steps import OBJECTIVE, exported, make_batch, make_policy

DISTRIBUTED = [False, True]
BATCH = make_batch().select(np.arange(7))


def policy_of(model: Any, train: str, scale: float | None = None, **sections: Any) -> Policy:
    policy = make_policy(model, {}, precision={"train": train, **sections.pop("precision", {})}, **sections)
    if scale is not None:
        set_scale(policy, scale)
    return policy


def set_scale(policy: Policy, scale: float, growth: int = 0) -> None:
    state = policy.optimizer.scaler.state_dict()
    policy.optimizer.scaler.load_state_dict({**state, "scale": torch.tensor([scale]), "growth_tracker": growth})


def scale_of(policy: Policy) -> tuple[float, int]:
    state = policy.optimizer.scaler.state_dict()
    return float(state["scale"]), state["growth_tracker"]


def update(policy: Policy, factor: float = 1.0) -> UpdateStats:
    """Make one update with the objective's loss multiplied by `factor`."""
    objective = make_objective(OBJECTIVE)

    def scaled(inputs: Any) -> Any:
        out = objective(inputs)
        return replace(out, loss=out.loss * factor)

    return policy.update(BATCH, scaled, objective.norm)


def update_with_gradients(policy: Policy, factor: float = 1.0) -> tuple[UpdateStats, dict[str, np.ndarray]]:
    """Make one update, and also return the gradients before the clip.

    They are divided by `factor`, because the export is in the model's dtype.
    """
    grads: dict[str, np.ndarray] = {}
    step = policy.optimizer.step

    def noting(norm: float) -> None:
        grads.update(exported(policy, lambda p: p.main_grad / factor))
        step(norm)

    policy.optimizer.step = noting  # type: ignore[method-assign]
    return update(policy, factor), grads


def count_passes(policy: Policy) -> list[float]:
    """Return a list that is filled with the loss scale of each pass over the batch."""
    scales: list[float] = []
    run = policy._run

    def counting(*args: Any, **kwargs: Any) -> Any:
        scales.append(scale_of(policy)[0])
        return run(*args, **kwargs)

    policy._run = counting  # type: ignore[method-assign]
    return scales


def error_of(found: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> float:
    """Return the largest relative error of a tensor, in the 2-norm."""
    return max(float(np.linalg.norm(found[k] - true[k]) / np.linalg.norm(true[k])) for k in true)


@pytest.fixture(scope="module")
def exact(qwen3):
    """Return the update in float32."""
    return update_with_gradients(policy_of(qwen3, "fp32"))


def test_a_float16_update_is_near_the_float32_one_and_nearer_than_bfloat16(qwen3, exact):
    stats, grads = update_with_gradients(policy_of(qwen3, "fp16"))
    rough, rough_grads = update_with_gradients(policy_of(qwen3, "bf16"))
    off, rough_off = (np.abs(s.logp - exact[0].logp).max() for s in (stats, rough))
    assert 0 < off < 0.01 and off < rough_off / 4, "10 bits of mantissa against 7"
    error = error_of(grads, exact[1])
    assert 0 < error < 0.02 and error < error_of(rough_grads, exact[1]) / 2
    assert stats.grad_norm == pytest.approx(exact[0].grad_norm, rel=2e-3), "the norm is reported without the scale"
    assert stats.metrics["optimizer/loss_scale"] == INITIAL_SCALE and stats.metrics["optimizer/overflows"] == 0
    assert not [name for s in (exact[0], rough) for name in s.metrics if name.startswith("optimizer/")]


def test_the_model_is_float16_and_its_masters_and_gradients_are_float32(qwen3):
    policy = policy_of(qwen3, "fp16")
    update(policy)
    for model in policy.models:
        assert {(p.dtype, p.main_param.dtype, p.main_grad.dtype) for p in model.parameters()} == {
            (torch.float16, torch.float32, torch.float32)
        }
        for p in model.parameters():
            assert torch.equal(p, p.main_param.half()) and not torch.equal(p.float(), p.main_param)


def test_the_scale_keeps_gradients_that_float16_alone_loses(qwen3, exact):
    tiny = 2.0**-16
    kept = update_with_gradients(policy_of(qwen3, "fp16"), tiny)[1]
    lost = update_with_gradients(policy_of(qwen3, "fp16", scale=1.0), tiny)[1]
    assert error_of(kept, exact[1]) < 0.02
    assert error_of(lost, exact[1]) > 0.3


@pytest.mark.parametrize("distributed", DISTRIBUTED, ids=["replicated", "distributed"])
def test_an_overflow_repeats_the_update_and_ends_as_if_the_scale_had_fit_from_the_start(qwen3, distributed):
    sections = {"optimizer": {"distributed": distributed}}
    high = policy_of(qwen3, "fp16", scale=2.0**26, **sections)
    scales = count_passes(high)
    stats = update(high)
    overflows = int(stats.metrics["optimizer/overflows"])
    assert overflows >= 2 and scales == [2.0 ** (26 - i) for i in range(overflows + 1)]
    assert stats.metrics["optimizer/loss_scale"] == scales[-1] == scale_of(high)[0]
    fits = policy_of(qwen3, "fp16", scale=scales[-1], **sections)
    before, plain = digest(fits), update(fits)
    assert digest(fits) == digest(high) != before
    assert (stats.grad_norm, stats.loss) == (plain.grad_norm, plain.loss) and np.array_equal(stats.logp, plain.logp)
    assert plain.metrics["optimizer/overflows"] == 0 and high.optimizer.updates == 1
    update(high)
    assert scales[overflows + 1] == scales[overflows], "the next update begins with the scale that fit"


@pytest.mark.parametrize("power", [16, 22])
def test_gradients_that_no_scale_brings_into_range_refuse_the_update_and_change_nothing(qwen3, power):
    policy, untouched = policy_of(qwen3, "fp16"), policy_of(qwen3, "fp16")
    for one in (policy, untouched):
        update(one)
        set_scale(one, 2.0**power, growth=41)
    scales, before = count_passes(policy), digest(policy)
    said = rf"gradients overflow float16 {power + 1} times, down to a loss scale of 1: .*untouched; lower what"
    with pytest.raises(PrecisionError, match=said) as refused:
        update(policy, factor=1e30)
    assert scales == [2.0 ** (power - i) for i in range(power + 1)] and refused.value.everywhere
    assert digest(policy) == before and scale_of(policy) == (2.0**power, 41)
    update(policy)
    update(untouched)
    assert digest(policy) == digest(untouched) != before and scale_of(policy) == scale_of(untouched)


def test_a_loss_that_is_not_finite_leaves_the_loss_scale_as_it_was(qwen3):
    policy = policy_of(qwen3, "fp16")
    update(policy)
    scale, factors, objective = scale_of(policy), iter([1e30, float("nan")]), make_objective(OBJECTIVE)
    factor = 0.0

    def spoiled(inputs: Any) -> Any:
        out = objective(inputs)
        return replace(out, loss=out.loss * factor)

    run = policy._run

    def next_pass(*args: Any, **kwargs: Any) -> Any:
        nonlocal factor
        factor = next(factors)
        return run(*args, **kwargs)

    policy._run = next_pass  # type: ignore[method-assign]
    with pytest.raises(PrecisionError, match="non-finite loss"):
        policy.update(BATCH, spoiled, objective.norm)
    assert next(factors, None) is None, "the first pass overflowed, the second one was refused"
    assert scale_of(policy) == scale


def test_the_scale_doubles_after_a_hundred_updates_without_an_overflow(qwen3):
    policy = policy_of(qwen3, "fp16")
    set_scale(policy, 2.0**10, growth=GROWTH_INTERVAL - 1)
    assert update(policy).metrics["optimizer/loss_scale"] == 2.0**10
    assert scale_of(policy) == (2.0**11, 0)
    assert update(policy).metrics["optimizer/loss_scale"] == 2.0**11
    assert scale_of(policy) == (2.0**11, 1)
    set_scale(policy, MAX_SCALE, growth=GROWTH_INTERVAL - 1)
    assert update(policy, factor=2.0**-40).metrics["optimizer/loss_scale"] == MAX_SCALE
    assert scale_of(policy) == (MAX_SCALE, 0), "gradients that never overflow do not make it infinite"


@pytest.mark.parametrize("distributed", DISTRIBUTED, ids=["replicated", "distributed"])
def test_a_resumed_run_has_the_scale_of_the_checkpoint_and_goes_on_bit_for_bit(qwen3, tmp_path, distributed):
    sections = {"optimizer": {"distributed": distributed}}
    policy = policy_of(qwen3, "fp16", **sections)
    update(policy)
    set_scale(policy, 2.0**13, growth=41)
    with Checkpoints(tmp_path, policy, keep=1) as checkpoints:
        checkpoints.save(TrainState(step=1, updates=1), wait=True)
    resumed = policy_of(qwen3, "fp16", **sections)
    with Checkpoints(tmp_path, resumed, keep=1) as checkpoints:
        checkpoints.load_newest()
    assert scale_of(resumed) == (2.0**13, 41) and digest(resumed) == digest(policy)
    assert update(resumed).metrics["optimizer/loss_scale"] == update(policy).metrics["optimizer/loss_scale"] == 2.0**13
    assert digest(resumed) == digest(policy) and scale_of(resumed) == scale_of(policy) == (2.0**13, 42)
    resumed.optimizer.restart()
    assert scale_of(resumed) == (INITIAL_SCALE, 0), "a restarted optimizer finds its scale anew"


@pytest.mark.parametrize(
    ("saved", "loaded", "said"),
    [("bf16", "fp16", "no loss scale: it was not"), ("fp16", "bf16", "a loss scale: it was")],
)
def test_a_checkpoint_with_and_without_a_loss_scale_are_not_taken_for_each_other(qwen3, tmp_path, saved, loaded, said):
    with Checkpoints(tmp_path, policy_of(qwen3, saved), keep=1) as checkpoints:
        checkpoints.save(TrainState(), wait=True)
    with (
        Checkpoints(tmp_path, policy_of(qwen3, loaded), keep=1) as checkpoints,
        pytest.raises(CheckpointError, match=f"holds {said} trained with precision.train: fp16"),
    ):
        checkpoints.load_newest()


def test_weights_beyond_the_range_of_float16_are_refused_by_name(tmp_path):
    folder = make_qwen3(tmp_path / "large", tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    policy_of(folder, "bf16")
    with pytest.raises(
        PrecisionError, match=r"tensor model.layers.2.mlp.down_proj.weight of .*large has values that float16"
    ):
        policy_of(folder, "fp16")


def test_a_float16_reference_comes_and_goes_without_a_trace(qwen3):
    policy = policy_of(qwen3, "fp16")
    policy.keep_reference()
    before = policy.logprobs(BATCH)
    update(policy)
    after, now = digest(policy), policy.logprobs(BATCH)
    assert np.array_equal(policy.reference_logprobs(BATCH), before) and not np.array_equal(now, before)
    assert digest(policy) == after and np.array_equal(policy.logprobs(BATCH), now)
    weight = next(t for name, t in policy.export() if name == "model.embed_tokens.weight" and t is not None)
    embedding = policy.models[0].embedding.word_embeddings.weight
    assert weight.dtype == torch.float32 and torch.equal(weight.half(), embedding[: len(weight)])


def test_sigma_is_float32_under_a_float16_model_and_gets_the_gradient_of_float32(qwen3):
    found = {}
    for train in ("fp32", "fp16"):
        policy = alp_policy(qwen3, {}, precision={"train": train})
        start, grads, step = sigmas(policy), {}, policy.optimizer.step

        def noting(norm: float, policy=policy, grads=grads, step=step) -> None:
            grads.update(sigmas(policy, lambda p: p.main_grad))
            step(norm)

        policy.optimizer.step = noting
        update(policy)
        found[train] = grads, {name: value - start[name] for name, value in sigmas(policy).items()}
        assert {layer.log_sigma.dtype for layer in policy.models[0].decoder.layers} == {torch.float32}
    for exact, half in zip(*found.values(), strict=True):
        assert len(exact) == 4
        for name, value in exact.items():
            assert value.item() != 0 and half[name].item() == pytest.approx(value.item(), rel=0.05), name


class Largest(TorchDispatchMode):
    """Mode that records the number of elements of the largest float32 tensor that any operation creates."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return out


def scored(
    case: Case, dtype: torch.dtype, fp32_product: bool, chunk_bytes: int | None = 5000
) -> dict[str, torch.Tensor]:
    """Return the scores of a case, and the gradients of both operands.

    Args:
        case: the inputs.
        dtype: the operands are rounded to it.
        fp32_product: as in `token_scores`.
        chunk_bytes: as in `token_scores`.
    """
    hidden, weight = (t.to(dtype, copy=True).requires_grad_() for t in (case.hidden, case.weight))
    assert dist.group.WORLD is not None
    logp, entropy = token_scores(
        hidden[case.rows],
        weight,
        case.labels,
        temperature=0.7,
        vocab_size=len(weight),
        group=dist.group.WORLD,
        chunk_bytes=chunk_bytes,
        fp32_product=fp32_product,
    )
    torch.autograd.backward([logp, entropy], [case.grad_logp, case.grad_entropy])
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    found = {"logp": logp.detach(), "entropy": entropy.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}
    return {name: value.double().cpu() for name, value in found.items()}


def largest_errors(found: dict[str, torch.Tensor], case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Return the errors against float64 from the same rounded operands, relative to the largest entry."""
    rounded = replace(case, hidden=case.hidden.to(dtype).float(), weight=case.weight.to(dtype).float())
    true = rounded.reference(0.7)
    return {name: float(np.abs(found[name].numpy() - true[name]).max() / np.abs(true[name]).max()) for name in found}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("chunk_bytes", [5000, 1 << 20])
def test_scores_of_a_float32_product_are_exact_for_the_operands_as_they_are(qwen3, dtype, chunk_bytes):
    policy_of(qwen3, "fp32")  # creates the process group
    case, unit = Case.make(), torch.finfo(dtype).eps
    exact = largest_errors(scored(case, dtype, True, chunk_bytes), case, dtype)
    rough = largest_errors(scored(case, dtype, False, chunk_bytes), case, dtype)
    for name in ("logp", "entropy"):
        assert exact[name] < 2e-6 < 1e-4 < rough[name], name
    for name in ("d_hidden", "d_weight"):  # rounded once: at most half a unit at the largest entry
        assert exact[name] <= 0.51 * unit and exact[name] < rough[name], name


class ProductsOfAGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU. 16-bit products with a float32 sum, which exist there alone, are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[str] = []

    def __torch_function__(self, called: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if called == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if "out_dtype" not in given:
            return called(*args, **given)
        with pytest.raises(NotImplementedError, match="dtype"):  # torch takes the arguments, and lacks the kernel here
            called(*args, **given)
        self.used.append(called.__name__)
        dtype, out = given.pop("out_dtype"), given.pop("out", None)
        made = called(*(arg.to(dtype) for arg in args), **given)
        return made if out is None else out.copy_(made)


def test_on_a_gpu_16_bit_products_are_summed_in_float32_and_never_rounded():
    generator = torch.Generator().manual_seed(4)
    d_logits = torch.randn(6, 20, generator=generator)
    hidden, weight = (torch.randn(rows, 8, generator=generator).bfloat16() for rows in (6, 20))
    d_hidden, d_weight = torch.empty_like(hidden), torch.ones(20, 8)
    with ProductsOfAGpu() as gpu:
        _Head().backward(d_logits, hidden, weight, d_hidden, d_weight)
        logits = _Float32Head(5).logits(hidden, weight, 1.0)
    assert gpu.used == ["addmm", "mm"]
    exact = 1 + d_logits.bfloat16().double().t() @ hidden.double()
    torch.testing.assert_close(d_weight.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().t(), atol=1e-5, rtol=0)


def test_a_float32_product_of_float32_weights_is_the_ordinary_one_bit_for_bit(qwen3):
    policy_of(qwen3, "fp32")
    a, b = (scored(Case.make(), torch.float32, wanted) for wanted in (True, False))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_float32_copy_of_the_weights_is_made_whole(qwen3):
    policy_of(qwen3, "fp32")
    case = Case.make(vocab=3000, tokens=8, width=32)
    hidden, weight = case.hidden[case.rows].bfloat16(), case.weight.bfloat16()
    arguments = {"temperature": 1.0, "vocab_size": 3000, "group": dist.group.WORLD}
    with Largest() as largest:
        token_scores(hidden, weight, case.labels, chunk_bytes=24_000, fp32_product=True, **arguments)
    assert largest.numel == 6000, "two rows of logits; a block of the weights is 187 rows of 32"
    with Largest() as whole:
        token_scores(hidden, weight, case.labels, chunk_bytes=4 * weight.numel(), fp32_product=True, **arguments)
    assert whole.numel == weight.numel(), "the same measure sees the whole copy where the chunk allows it"


def test_the_policy_s_log_probabilities_come_from_the_float32_product_when_it_is_asked_for(qwen3):
    wanted, plain = (policy_of(qwen3, "bf16", precision={"fp32_lm_head": flag}) for flag in (True, False))
    states: list[torch.Tensor] = []
    hook = wanted.models[0].decoder.register_forward_hook(lambda module, args, out: states.append(out.detach()))
    found = wanted.logprobs(BATCH)
    hook.remove()
    weight = wanted.models[0].output_layer.weight.detach()
    assert weight.dtype == states[0].dtype == torch.bfloat16
    table = torch.cat([torch.log_softmax(s[:, 0].float() @ weight[:259].float().T / 0.7, -1) for s in states])
    rough = plain.logprobs(BATCH)
    trained = np.flatnonzero(BATCH.mask > 0)
    # Streams order the trajectories in another way. So a token's score must be among the scores of its word.
    for at in trained[::3]:
        column = table[:, int(BATCH.tokens[at])]
        assert (column - float(found[at])).abs().min() < 2e-6
    assert 1e-3 < np.abs(found - rough)[trained].max() < 0.2, "logits rounded to bfloat16 are other ones"
