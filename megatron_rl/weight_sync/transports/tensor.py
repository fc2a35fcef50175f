"""Weights through memory that the trainer shares with engines of its machine: shared memory on CPU, CUDA IPC on a GPU."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket
from megatron_rl.protocol.payload import pack_payload, shared_buffer
from megatron_rl.weight_sync.transports.transport import BucketTransport, each


class TensorTransport(BucketTransport):
    """One bucket lies in shared memory; engines map it, copy what is theirs, and answer."""

    def memory(self, nbytes: int, device: torch.device) -> Tensor:
        return shared_buffer(nbytes, device)

    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        """Nobody waits: every bucket was answered."""

    def close(self, engines: EnginePool | None) -> None:
        self._buckets.free()

    def send(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        if bucket.data.is_cuda:
            torch.cuda.synchronize()  # other processes read without regard to our streams
        tensors = list(bucket.tensors())
        # A payload for each process that maps it: CUDA counts who has opened a handle.
        payloads = {url: [pack_payload(tensors) for _ in range(count)] for url, count in ranks.items()}
        return each(ranks, lambda url: engines.load_tensors(url, payloads[url], version))[1]
