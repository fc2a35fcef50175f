"""Transformer Engine's compiled module in plain torch, as far as a step of the trainer calls it.

The module `transformer_engine_torch` is C++ and CUDA. `FUNCTIONS` is the table of its functions that have a stand-in.
Their arguments are those of the C++ declarations. Transformer Engine's Python names hundreds of others. Each of these
can be named, and raises an error with its name when it is used.

A product is computed in float32 and rounded once, as the real one is. Quantized operands, biases, fused activations and
communication inside a product have no stand-in: they raise an error.
"""

import enum
import re
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

VERSION = "2.20.2"


class DType(enum.IntEnum):
    kByte = 0  # noqa: N815  Transformer Engine's names
    kInt32 = 2  # noqa: N815
    kFloat32 = 4  # noqa: N815
    kFloat16 = 5  # noqa: N815
    kBFloat16 = 6  # noqa: N815
    kFloat8E4M3 = 7  # noqa: N815
    kFloat8E5M2 = 8  # noqa: N815
    kFloat4E2M1 = 10  # noqa: N815


_TORCH = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}
_SIDES = ("INPUT", "WEIGHT", "OUTPUT")
ENUMS = {
    "DType": DType,
    "FP8FwdTensors": enum.IntEnum("FP8FwdTensors", [f"GEMM{n}_{side}" for n in (1, 2, 3) for side in _SIDES], start=0),
    "FP8BwdTensors": enum.IntEnum(
        "FP8BwdTensors", [f"GRAD_{side}{n}" for n in (1, 2, 3) for side in ("OUTPUT", "INPUT")], start=0
    ),
    "NVTE_Fused_Attn_Backend": enum.IntEnum(
        "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    ),
}


def _matrix(operand: Any, transposed: bool) -> Tensor:
    """Return a product's operand [rows, columns] in float32."""
    if type(operand) not in (Tensor, torch.nn.Parameter):
        raise NotImplementedError(f"a product of {type(operand).__name__} has no stand-in on a CPU")
    plain = operand.detach().reshape(-1, operand.shape[-1]).float()
    return plain.t() if transposed else plain


def _refuse(**used: Any) -> None:
    for name, value in used.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"a product with {name} has no stand-in on a CPU")


def product(a: Any, a_transposed: bool, b: Any, b_transposed: bool) -> Tensor:
    """Return op(B) @ op(A) of row-major matrices, which is cuBLAS's op(A) @ op(B) of column-major ones."""
    return _matrix(b, b_transposed) @ _matrix(a, a_transposed)


def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, None, None, None]:
    """Multiply two matrices, and add the product to D or write it there if D is given."""
    _refuse(quantizer=quantizer, bias=bias, gelu=gelu, comm_overlap=comm_overlap, extra_output=extra_output)
    assert alpha == 1.0 and beta == (1.0 if accumulate else 0.0)
    made = product(A, transA, B, transB)
    if D is not None:
        D.copy_(D.float() + made.view_as(D) if accumulate else made.view_as(D))
        return D, None, None, None
    dtype = A.dtype if output_dtype is None else _TORCH[DType(int(output_dtype))]
    shape = (*B.shape[:-1], made.shape[-1]) if not transB else made.shape
    return made.view(shape).to(dtype), None, None, None


def te_general_grouped_gemm(
    A: list[Tensor],
    transa: bool,
    B: list[Tensor],
    transb: bool,
    D: list[Tensor],
    D_type: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspace: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """Multiply pairs of matrices. With `single_output` the products are slices of one matrix."""
    for given in (*bias, *pre_gelu_out):
        _refuse(**({"bias or gelu": given} if given.numel() else {}))
    outputs = D[0].split(m_splits) if single_output else D
    for a, b, out in zip(A, B, outputs, strict=True):
        # An expert without tokens: an empty product is zero.
        made = product(a, transa, b, transb).view_as(out)
        out.copy_(out.float() + made if accumulate else made)
    return bias


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """Normalize rows. Return the result, and the inverse of each row's root mean square."""
    _refuse(quantizer=quantizer, zero_centered_gamma=zero_centered_gamma)
    x = input.float()
    inverse = torch.rsqrt(x.pow(2).mean(-1) + eps)
    made = (x * inverse[..., None] * weight.float()).to(_TORCH[DType(int(otype))])
    if ln_out is not None:
        made = ln_out.copy_(made)
    return made, None, inverse


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the weight."""
    _refuse(zero_centered_gamma=zero_centered_gamma)
    inverse, grad = rsigma.view(*x.shape[:-1], 1), dz.float().view_as(x)
    normal = x.float() * inverse
    scaled = grad * gamma.float()
    dx = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normal).reshape(-1, x.shape[-1]).sum(0).to(gamma.dtype)


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """Return the sequences [tokens, heads, dim] of a stream, padded with zeros to one length."""
    lengths = cu_seqlens.diff().tolist()
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for row, sequence in zip(out, tensor[: sum(lengths)].split(lengths), strict=True):
        row[: len(sequence)] = sequence
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """Return the stream [t, heads, dim] of padded sequences."""
    out, ends = tensor.new_zeros(t, *tensor.shape[2:]), cu_seqlens.tolist()
    for row, start, end in zip(tensor, ends[:-1], ends[1:], strict=True):
        out[start:end] = row[: end - start]
    return out


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Make a step of Adam (mode 0) or AdamW (mode 1) of lists of gradients, parameters and both moments."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*tensor_lists, strict=True):
        g = gradient.float() + (weight_decay * parameter.float() if mode == 0 else 0)
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        change = (mean / first) / ((square / second).sqrt() + epsilon)
        parameter.copy_(parameter.float() - lr * (change + (weight_decay * parameter.float() if mode == 1 else 0)))


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors of a list, and the norm of each."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_zeros(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """Write scaled copies of the tensors of the first list into those of the second."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)


def get_cudnn_version() -> int:
    """Return a version of cuDNN that this Transformer Engine accepts."""
    return 92000


def get_num_cublas_streams() -> int:
    """Return how many products of a group the real module computes at the same time."""
    return 4


FUNCTIONS = {
    function.__name__: function
    for function in (
        generic_gemm,
        te_general_grouped_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        convert_thd_to_bshd,
        convert_bshd_to_thd,
        multi_tensor_adam,
        multi_tensor_l2norm,
        multi_tensor_scale,
        get_cudnn_version,
        get_num_cublas_streams,
    )
}


class Absent:
    """A name without a stand-in. Calling it raises NotImplementedError with the name.

    Members of enumerations have names, too, and numbers: Transformer Engine's Python has tables of them, from names to
    numbers. Here the number of a member is arbitrary.
    """

    _numbers: ClassVar[dict[str, int]] = {}

    def __init__(self, name: str) -> None:
        self._name = name

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name} has no stand-in on a CPU (tests/te_cpu/compiled.py)")

    __call__ = __index__ = __bool__ = __iter__ = __enter__ = _raise

    def __int__(self) -> int:
        return self._numbers.setdefault(self._name, len(self._numbers))

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)  # of typing and inspect
        return Absent(f"{self._name}.{name}")

    def __repr__(self) -> str:
        return f"<{self._name}, which has no stand-in>"


class CompiledModule(types.ModuleType):
    """`transformer_engine_torch`: `FUNCTIONS`, `ENUMS`, and an `Absent` for every other name that the package uses.

    Args:
        package: folder of the package `transformer_engine`.
    """

    def __init__(self, package: Path) -> None:
        super().__init__("transformer_engine_torch", "Transformer Engine's compiled module in plain torch.")
        self.__dict__.update({name: Absent(f"{self.__name__}.{name}") for name in _names_in(package)})
        self.__dict__.update(ENUMS, **FUNCTIONS)
        self.__all__ = [name for name in self.__dict__ if not name.startswith("__")]


def _names_in(package: Path) -> set[str]:
    """Return the names of the compiled module that a package's Python uses."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (package / "pytorch").rglob("*.py"))
    listed = re.findall(r"from transformer_engine_torch import (\([^)]*\)|.*)", source)
    return {*re.findall(r"\btex\.([A-Za-z]\w*)", source), *re.findall(r"[A-Za-z]\w*", " ".join(listed))}
