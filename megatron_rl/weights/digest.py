"""The digest of a tensor.

The exporter, the files in transit and the engine that serves the tensor all use this one digest.
"""

import torch
import xxhash


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the XXH3-128 digest of a tensor's dtype, shape and bytes, as a hex string.

    Bit-identical tensors have equal digests; other tensors have different digests. The digest protects against
    accidents, not against attackers: it is computed during every weight update, where a cryptographic digest would take
    longer than the transfer.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
