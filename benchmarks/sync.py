"""Weight updates by every transport, against a raw copy in memory and a raw gloo broadcast of the same bytes.

The time of an update is that of one `push`: export stream to the paused engine, digests on both sides, confirmation,
and generation again. The raw broadcast goes to a process that does nothing else. Each round runs everything once, so
that ratios compare measurements close in time. Prints a table for each size, and one JSON line for docs/benchmarks.md.

    python benchmarks/sync.py [--megabytes 64 512 --engine sglang --bucket-mb 64 --repeat 5]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_rl.config import PrecisionConfig, SGLangConfig
from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.embedded import EmbeddedServers
from megatron_rl.engines.processes.server_process import Servers
from megatron_rl.engines.processes.sglang import SGLangServers, server_flags
from megatron_rl.precision.plan import resolve
from megatron_rl.protocol.update_group import UpdateGroup, connect_store, create_store
from megatron_rl.weight_sync.sync import WeightSync
from megatron_rl.weight_sync.transports.disk import DiskTransport
from megatron_rl.weight_sync.transports.distributed import DistributedTransport
from megatron_rl.weight_sync.transports.tensor import TensorTransport
from megatron_rl.weights.hf_folder import HFFolder

VOCAB, HIDDEN, WIDE = 2048, 1024, 3072
TIMEOUT_S = 300.0


def make_model(folder: Path, megabytes: int) -> Path:
    """Write a model with about `megabytes` * 10^6 bytes of fp32 weights, in layers with the shapes of a 0.6B model."""
    layer = 4 * (HIDDEN * (16 + 2 * 8) * 128 + 16 * 128 * HIDDEN + 3 * HIDDEN * WIDE)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=max(1, round((megabytes * 10**6 - 8 * VOCAB * HIDDEN) / layer)),
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def make_servers(engine: str, model: Path, logs: Path) -> Servers:
    if engine == "embedded":
        return EmbeddedServers(model, logs, threads=1)
    flags = server_flags(resolve(PrecisionConfig(), 2, engine="sglang", device="cpu"), SGLangConfig(), device="cpu")
    return SGLangServers(model, logs, flags)


def receive(port: int, nbytes: int) -> None:
    """Receive the raw broadcasts. A first byte of 0 means that there are no more."""
    torch.set_num_threads(1)
    group = UpdateGroup.join(
        "raw", connect_store("127.0.0.1", port, 2, 60), rank=1, world=2, backend="gloo", timeout_s=TIMEOUT_S
    )
    data, word = torch.empty(nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    while True:
        group.broadcast(word)
        if not word.item():
            return
        group.broadcast(data)
        dist.barrier(group=group._group)


@contextmanager
def raw_broadcast(data: torch.Tensor) -> Iterator[Callable[[], None]]:
    """Yield a function that broadcasts `data` to one process and returns when that process has it."""
    store = create_store(60)
    peer = mp.get_context("spawn").Process(target=receive, args=(store.port, data.numel()))
    peer.start()
    group = UpdateGroup.join("raw", store, rank=0, world=2, backend="gloo", timeout_s=TIMEOUT_S)

    def send() -> None:
        group.broadcast(torch.ones(1, dtype=torch.uint8))
        group.broadcast(data)
        dist.barrier(group=group._group)

    yield send
    group.broadcast(torch.zeros(1, dtype=torch.uint8))
    peer.join()
    group.leave()


def seconds(run: Callable[[], object]) -> float:
    """Return the wall-clock seconds that `run` takes, because several processes work."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, megabytes: int) -> dict[str, object]:
    bucket = args.bucket_mb << 20
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = HFFolder(make_model(folder / "hf", megabytes))
        weights = [(name, source.read(name).clone()) for name in source.tensors]
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in weights])
        elsewhere = torch.empty_like(flat)
        servers = stack.enter_context(make_servers(args.engine, source.path, folder))
        pool = stack.enter_context(EnginePool(servers.urls, TIMEOUT_S))
        broadcast = stack.enter_context(raw_broadcast(flat))
        transports = {
            "disk": DiskTransport(source, folder / "staging"),
            "distributed": DistributedTransport(bucket, TIMEOUT_S, torch.device("cpu")),
            "tensor": TensorTransport(bucket),
        }
        works: dict[str, Callable[[], object]] = {"copy": lambda: elsewhere.copy_(flat), "gloo broadcast": broadcast}
        version = 0

        def push(sync: WeightSync) -> None:
            nonlocal version
            version += 1
            sync.push(iter(weights), version)

        for name in args.transports:
            sync = WeightSync(pool, source, transports[name])
            stack.callback(sync.close)
            works[name] = lambda sync=sync: push(sync)  # type: ignore[misc]
        for work in works.values():
            work()
        rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(args.repeat)]
    ratios = {name: statistics.median(r[name] / r["gloo broadcast"] for r in rounds) for name in works}
    return {
        "megabytes": flat.numel() / 1e6,
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in works},
        "to_broadcast": ratios,
    }


def show(result: dict[str, object]) -> None:
    size = result["megabytes"]
    print(f"{f'{size:.0f} MB':<18}{'seconds':>10}{'GB/s':>10}{'x broadcast':>14}")
    for name, taken in result["seconds"].items():  # type: ignore[attr-defined]
        print(
            f"{name:<18}{taken:>10.3f}{size / 1e3 / taken:>10.2f}"  # type: ignore[operator]
            f"{result['to_broadcast'][name]:>14.2f}"  # type: ignore[index]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--engine", choices=["embedded", "sglang"], default="embedded")
    parser.add_argument("--transports", nargs="+", default=["disk", "distributed", "tensor"])
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(args, megabytes) for megabytes in args.megabytes]
    for result in results:
        show(result)
    print(json.dumps({**vars(args), "results": results}))


if __name__ == "__main__":
    main()
