"""Low precision in the policy's model: megatron-core's settings for it, and a check that quantized products ran."""

import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_rl.config import Config
from megatron_rl.errors import PrecisionError
from megatron_rl.policy.parallel import Mesh
from megatron_rl.precision.delayed import DelayedScaleHooks, LinearScales
from megatron_rl.precision.linear import QuantizedLinear, linears
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.precision.products import PRODUCTS


def transformer_engine_recipe(config: Config, plan: PrecisionPlan) -> dict[str, Any]:
    """Return the fields of TransformerConfig that give Transformer Engine's layers the recipe.

    Do not use them for megatron-core's local layers. Without Transformer Engine these fields do nothing, and training
    is silently bf16.
    """
    if plan.recipe == "none":
        return {}
    kept = {"first_last_layers_bf16": bool(plan.kept), "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    if plan.recipe == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4", **kept}
    if plan.recipe == "blockwise":
        _block_scales(config.precision.pow2_scales)
    return {"fp8": config.precision.format, "fp8_recipe": plan.recipe, **kept}


def _block_scales(pow2: bool) -> None:
    """Set whether the scales of Transformer Engine's block-scaling recipe are powers of two.

    The recipe reads NVTE_FP8_BLOCK_SCALING_FP32_SCALES only once, at import, and megatron-core creates the recipe
    itself. So this function sets its defaults, which are attributes of the class, and checks a recipe made from them.
    """
    recipes = importlib.import_module("transformer_engine.common.recipe")
    kind = recipes.Float8BlockScaling
    names = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
    for name in names:
        setattr(kind, name, recipes.QParams(power_2_scale=pow2, amax_epsilon=0.0))
    made = kind()
    if any(getattr(made, name).power_2_scale != pow2 for name in names):
        raise PrecisionError(
            f"this transformer-engine does not take precision.pow2_scales: {str(pow2).lower()} for block scaling: "
            f"start with NVTE_FP8_BLOCK_SCALING_FP32_SCALES={int(not pow2)} in the environment"
        )


class ProductMonitor:
    """Counter of the quantized products of an update. `record` raises an error if any of them did not run.

    The constructor checks every linear of every layer: quantized where the plan requires it, plain in layers that are
    kept. With Transformer Engine only forward products are counted, by the `fp8` flag of its modules.

    Args:
        plan: the precision plan.
        models: this rank's model chunks.
        mesh: this rank's position in the parallel layout.
        transformer_engine: True if the layers are Transformer Engine's.
    """

    def __init__(
        self, plan: PrecisionPlan, models: Sequence[torch.nn.Module], mesh: Mesh, transformer_engine: bool
    ) -> None:
        self.plan, self.mesh, self.products = plan, mesh, PRODUCTS[:1] if transformer_engine else PRODUCTS
        self.linears: list[tuple[str, Counter[str]]] = []
        self.scales: list[LinearScales] = []
        self.unreachable_scales = transformer_engine and plan.recipe == "delayed"
        for model in models if plan.recipe != "none" else ():
            block: Any = model.decoder
            for layer, kind, linear in linears(block):
                if transformer_engine:
                    self._watch(layer, kind, linear)
                else:
                    self._check(layer, kind, linear)
            scales = [
                linear.scales
                for _, _, linear in linears(block)
                if isinstance(linear, QuantizedLinear) and linear.scales
            ]
            if scales:
                group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
                DelayedScaleHooks(block, scales, group)
                self.scales += scales

    def _check(self, layer: int, kind: str, linear: torch.nn.Module) -> None:
        quantized = isinstance(linear, QuantizedLinear)
        if quantized == (layer in self.plan.kept):
            found = "quantized" if quantized else "not quantized"
            raise PrecisionError(
                f"precision.recipe is {self.plan.recipe}, but the {kind} of layer {layer} was built {found} "
                f"({type(linear).__name__}): this version of megatron-core builds its layers in another way; "
                "install one that pyproject.toml allows, or set precision.recipe: none"
            )
        if isinstance(linear, QuantizedLinear):
            self.linears.append((kind, linear.ran))

    def _watch(self, layer: int, kind: str, linear: torch.nn.Module) -> None:
        if layer in self.plan.kept:
            return
        ran: Counter[str] = Counter()

        def note(module: Any, args: Any, output: Any) -> None:
            ran["fprop"] += bool(module.fp8)  # set in every forward, also for fp4 recipes

        linear.register_forward_hook(note)
        self.linears.append((kind, ran))

    def scale_tensors(self) -> list[torch.Tensor]:
        """Return this rank's scales of delayed scaling and their histories, not copied. Empty with other recipes.

        The result is also empty if `unreachable_scales`: Transformer Engine does not expose the scales of its layers.
        """
        return [tensor for scales in self.scales for tensor in scales.tensors()]

    def start(self) -> None:
        """Reset the counts of products."""
        for _, ran in self.linears:
            ran.clear()

    def record(self) -> dict[str, float]:
        """Return the number of quantized products since `start`, by `precision/gemms/<kind>`. Collective.

        Rank 0 gets the products of all ranks, every other rank its own. The numbers are those of one update. The record
        of a step has their mean per update.

        Raises:
            PrecisionError: on every rank, if a quantized linear of any rank lacks one of its products.
        """
        if self.plan.recipe == "none":
            return {}
        idle = sorted({f"{name} of {kind}" for kind, ran in self.linears for name in self.products if not ran[name]})
        if self.mesh.any(bool(idle)):
            missing = self.mesh.broadcast(sorted(set().union(*self.mesh.gather(set(idle)))))
            self.mesh.raise_everywhere(
                PrecisionError(
                    f"precision.recipe is {self.plan.recipe}, but this update ran without quantized products "
                    f"({', '.join(missing)}): the update is refused, parameters are untouched; "
                    "install a megatron-core that pyproject.toml allows, "
                    "let nothing replace the forward of these linears, or set precision.recipe: none"
                )
            )
        own: Counter[str] = Counter()
        for kind, ran in self.linears:
            own[kind] += ran.total()
        gathered = self.mesh.gather(own)
        total = sum(gathered, Counter()) if self.mesh.rank == 0 else own
        return {f"precision/gemms/{kind}": float(count) for kind, count in total.items()}
