"""One digest for a tensor, whoever holds it: the exporter, the file on its way, the engine that serves it."""

import torch
import xxhash


def tensor_digest(tensor: torch.Tensor) -> str:
    """XXH3-128 over dtype, shape and bytes: bit-identical tensors have equal digests, others differ.

    Against accidents, not adversaries: it runs beside every weight update, where a cryptographic digest would take longer
    than the transfer.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
