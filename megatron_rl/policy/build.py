"""Builds a policy. Only this module reads the policy's sections of the configuration."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.config import Config
from megatron_rl.policy.actor import Policy, PolicySettings
from megatron_rl.policy.fused_kernels import fuse_weight_gradients, overlaps_gradients
from megatron_rl.policy.loss_denominator import finalize_gradients
from megatron_rl.policy.model import PolicyModel, build_chunks
from megatron_rl.policy.modules import has_te_layers
from megatron_rl.policy.optimizer import PolicyOptimizer
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.quantized_products import ProductMonitor
from megatron_rl.policy.routing_replay import RoutingReplay, weight_buffers
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.hf_model import check_folder
from megatron_rl.weights.load_weights import find_bad_weights, load_weights


def build_policy(config: Config, mesh: Mesh, precision: PrecisionPlan, noise: LayerNoise | None) -> Policy:
    """Build the model under the layout, load its weights and make its optimizer. Collective.

    Args:
        config: the resolved configuration.
        mesh: the parallel layout.
        precision: the resolved precision plan.
        noise: the resolved noise of ALP; None without ALP.

    Raises:
        ConfigError, CheckpointError: the folder does not fit the layout.
        PrecisionError: its weights do not fit the trainer's dtype.
    """
    sizes = {"tensor_parallel": mesh.tp_size, "expert_parallel": config.parallel.expert}
    source = check_folder(HFFolder(config.model.path), **sizes)
    shape = source.shape
    models = build_chunks(config, shape, mesh, precision, noise)
    load_weights(models, source, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    dtype, tf_config, cuda = DTYPES[config.precision.train], models[0].config, mesh.device.type == "cuda"
    te = has_te_layers(dtype)
    if te and cuda:
        fuse_weight_gradients(models)
    products = ProductMonitor(precision, models, mesh, te)
    routing = RoutingReplay(config, shape, models, mesh)
    failures = mesh.gather(find_bad_weights(models, source))
    mesh.raise_everywhere(mesh.broadcast(next(filter(None, failures), None)))
    wrapped: list[Any] = list(models) if dtype == torch.float32 else [_in_16_bits(tf_config, m) for m in models]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=overlaps_gradients(config.parallel, te=te, cuda=cuda),
        average_in_collective=False,
    )
    chunks = [
        DistributedDataParallel(tf_config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(wrapped)
    ]
    optimizer = PolicyOptimizer(config.optimizer, config.alp, chunks, dtype)
    tf_config.grad_scale_func = optimizer.core.scale_loss
    tf_config.finalize_model_grads_func = finalize_gradients
    if ddp.overlap_grad_reduce:  # gradients are summed after the last micro-batch alone
        tf_config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    settings = PolicySettings(
        tokens_per_microbatch=config.optimizer.tokens_per_microbatch,
        max_new_tokens=config.rollout.max_new_tokens,
        alp=config.alp.enabled,
        noise_seed=config.run.seed,
        noise_is_sharded=config.parallel.sequence and config.alp.layers != "logits",
    )
    return Policy(settings, mesh, source, models, chunks, optimizer, products, routing)


def _in_16_bits(tf_config: TransformerConfig, model: PolicyModel) -> Float16Module:
    """Return a chunk whose parameters are cast. Buffers that hold weights keep their values in fp32.

    megatron-core would round them and then store the rounded values in fp32.
    """
    kept = {name: buffer.clone() for name, buffer in weight_buffers(model)}
    wrapped = Float16Module(tf_config, model)
    for name, buffer in weight_buffers(model):
        buffer.data = kept[name]
    return wrapped
