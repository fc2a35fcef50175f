"""Transport through memory shared with engines on the same machine: shared memory on CPU, CUDA IPC on a GPU."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket
from megatron_rl.protocol.payload import pack_payload, shared_buffer
from megatron_rl.weight_sync.transports.transport import BucketTransport, each


class TensorTransport(BucketTransport):
    """Transport of one bucket at a time in shared memory. Engines map it, copy their part, and respond."""

    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Send all buckets. Memory of a GPU is new for each version: torch keeps a record of every share of a buffer.

        See `Transport.deliver`.
        """
        try:
            return super().deliver(engines, ranks)
        finally:
            if self._buckets.on_gpu:
                self._buckets.free()
                torch.cuda.ipc_collect()

    def memory(self, nbytes: int, device: torch.device) -> Tensor:
        """Return [nbytes] uint8 memory that other processes can map."""
        return shared_buffer(nbytes, device)

    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        """Do nothing: every bucket was confirmed, so no engine waits."""

    def close(self, engines: EnginePool | None) -> None:
        """Release the memory of the buckets."""
        self._buckets.free()

    def send(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        """Send a bucket to all engines. Return the errors, by engine. See `BucketTransport.send`."""
        if bucket.data.is_cuda:
            torch.cuda.synchronize()  # other processes read it without waiting for this process's streams
        # One payload for each process that maps it: CUDA counts the processes that opened a handle.
        payloads = {url: [pack_payload(bucket) for _ in range(count)] for url, count in ranks.items()}
        return each(ranks, lambda url: engines.load_tensors(url, payloads[url], version))[1]
