"""One digest for a tensor, whoever holds it: the exporter, the file on its way, the engine that serves it."""

import hashlib

import torch


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes; equal digests mean bit-identical tensors."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
