"""Check that a Hugging Face checkpoint loaded into megatron-core and exported again is equal byte for byte.

Run one process per rank (torchrun, or srun with RANK exported). The exit code is 0 if every tensor is identical.
"""

import sys
from pathlib import Path

import typer

from megatron_rl.config import make_config
from megatron_rl.errors import MegatronRLError
from megatron_rl.policy import parallel
from megatron_rl.policy.build import build_policy
from megatron_rl.policy.device_port import pick_device
from megatron_rl.weights.digest import tensor_digest


def verify(
    model: Path, tensor: int = 1, pipeline: int = 1, virtual_pipeline: int = 1, data: int = 1, expert: int = 1
) -> None:
    """Load MODEL under the layout, export it, compare every tensor's dtype, shape and bytes with the file."""
    layout = {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": virtual_pipeline,
        "data": data,
        "expert": expert,
    }
    try:
        # With tensor parallelism, experts need sequence parallelism. It changes no weight.
        config = make_config({"model": {"path": str(model)}, "parallel": layout | {"sequence": tensor > 1}})
        device = pick_device(config.run.device)
        policy = build_policy(config, parallel.initialize(config.parallel, device, seed=0))
        changed, total = [], 0
        for name, exported in policy.export():
            if exported is not None:
                total += 1
                if tensor_digest(exported) != tensor_digest(policy.source.read(name)):
                    changed.append(name)
        changed = policy.mesh.broadcast(changed)
    except MegatronRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if policy.mesh.rank == 0:
        kinds = sorted({str(info.dtype).removeprefix("torch.") for info in policy.source.tensors.values()})
        verdict = f"CHANGED: {', '.join(changed)}" if changed else "all identical"
        print(f"{model}: {total} tensors ({', '.join(kinds)}) under {layout}: {verdict}")
    parallel.shutdown()
    if changed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(verify)
