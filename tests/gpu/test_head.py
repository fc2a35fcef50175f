"""The head's scores and gradients on a GPU are those of a CPU, with products in fp32 as well."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.config import ParallelConfig
from megatron_rl.policy import parallel
from megatron_rl.policy.device_port import pick_device
from tests.gpu.needs import needs_cuda
from tests.parallel.score_steps import Case
from tests.unit.policy.test_precision import largest_errors, scored

pytestmark = needs_cuda


@pytest.fixture(scope="module")
def device():
    """Return the GPU, in a process group of this process alone."""
    found = pick_device("cuda")
    parallel.initialize(ParallelConfig(), found, seed=0)
    yield found
    parallel.shutdown()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("chunk_bytes", [5000, 1 << 20])
def test_scores_of_a_float32_product_are_exact_for_the_operands_as_they_are(device, dtype, chunk_bytes):
    assert dist.group.WORLD is not None
    case, unit = Case.make(), torch.finfo(dtype).eps
    exact = largest_errors(scored(case.to(device), dtype, True, chunk_bytes), case, dtype)
    rough = largest_errors(scored(case.to(device), dtype, False, chunk_bytes), case, dtype)
    for name in ("logp", "entropy"):
        assert exact[name] < 5e-6 < 1e-4 < rough[name], name
    for name in ("d_hidden", "d_weight"):
        assert exact[name] <= 0.51 * unit and exact[name] < rough[name], name


def test_a_head_of_default_chunks_has_the_gradients_of_a_cpu(device):
    case = Case.make()
    found = scored(case.to(device), torch.float32, False, None)
    for name, error in largest_errors(found, case, torch.float32).items():
        assert error < 1e-5 and np.isfinite(error), name
