"""CPU of rank 0 per sampled token, from the bytes of an engine's response to the columns of a batch.

Stub servers in another process return canned responses of real size: 8 samples of one prompt with log-probabilities, in
SGLang's JSON. The trainer's side is the real one: `sample_group` over an `EnginePool`, then `make_batch`. *Plain* reads
the same bytes with `json`, and makes tuples and then arrays of them: one Python object per number. The two alternate,
and the ratio is a median of pairs. CPU time is that of the whole process, all threads.

Also: requests per second of small answers with 1, 8 and 64 engines, and 2,048 requests at once under a soft limit of
1,024 open files. Prints a table, and one JSON line for docs/benchmarks.md.

    python benchmarks/ingest.py [--repeat 5] [--unfrozen]
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import httpx
import numpy as np

from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams, together
from megatron_rl.sampling.batch import make_batch
from megatron_rl.sampling.group import GroupSettings, sample_group
from megatron_rl.types import Prompt, Trajectory

SAMPLES = 8
PROMPT = Prompt("p", "", tuple(range(100, 300)), "")


def canned_answer(tokens: int) -> bytes:
    """Return the JSON of `SAMPLES` samples with `tokens` tokens each."""
    rng = np.random.default_rng(0)

    def entry() -> dict:
        ids = rng.integers(0, 151_000, tokens).tolist()
        scores = (-rng.exponential(1.0, tokens)).astype(np.float32).tolist()
        meta = {
            "id": "0" * 32,  # one that SGLang makes up belongs to any request
            "finish_reason": {"type": "length", "length": tokens},
            "prompt_tokens": len(PROMPT.tokens),
            "completion_tokens": tokens,
            "weight_version": "0",
            "weight_versions": [{"version": "0", "start": 0, "end": tokens}],
            "output_token_logprobs": [[score, token, None] for score, token in zip(scores, ids, strict=True)],
        }
        return {"text": "x" * 4 * tokens, "output_ids": ids, "meta_info": meta}

    return json.dumps([entry() for _ in range(SAMPLES)]).encode()


def serve(pipe: Connection, engines: int, answer: bytes, seconds: float) -> None:
    """Listen on `engines` ports and send every POST the same response after `seconds`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):  # the client has given up
            writer.close()
            return
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0)
        await reader.readexactly(length)
        body = answer if head.startswith(b"POST") else b"{}"
        await asyncio.sleep(seconds if head.startswith(b"POST") else 0)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            % len(body)
        )
        writer.write(body)
        await writer.drain()
        writer.close()

    async def run() -> None:
        servers = [await asyncio.start_server(one, "127.0.0.1", 0, backlog=4096) for _ in range(engines)]
        pipe.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    asyncio.run(run())


@contextmanager
def stubs(engines: int, answer: bytes, seconds: float = 0.0) -> Iterator[list[str]]:
    """Start stub servers in another process, and yield their URLs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, engines, answer, seconds))
    process.start()
    try:
        yield [f"http://127.0.0.1:{port}" for port in ours.recv()]
    finally:
        ours.send(None)
        process.join()


def plain_batch(url: str, groups: int) -> None:
    """Get the same responses, one after the other, and make arrays of one Python object per number."""
    columns: list[tuple[list[int], list[float]]] = []
    with httpx.Client(trust_env=False, timeout=60) as client:
        for _ in range(groups):
            body = {"input_ids": list(PROMPT.tokens), "sampling_params": {"n": SAMPLES}}
            for entry in json.loads(client.post(f"{url}/generate", json=body).content):
                tokens = tuple(int(token) for token in entry["output_ids"])
                pairs = entry["meta_info"]["output_token_logprobs"]
                assert tuple(pair[1] for pair in pairs) == tokens
                columns.append((list(tokens), [float(pair[0]) for pair in pairs]))
    np.concatenate([np.asarray(tokens, np.int32) for tokens, _ in columns])
    np.concatenate([np.asarray(scores, np.float32) for _, scores in columns])


def our_batch(pool: EnginePool, groups: int, tokens: int) -> None:
    """Sample groups through the pool, and make the batch."""
    settings = GroupSettings(0, SAMPLES, tokens, 1.0, (), need_logmu=True)

    async def sample() -> list[Trajectory]:
        works = [sample_group(pool.sample, PROMPT, settings, first_id=SAMPLES * g, group=g) for g in range(groups)]
        return [t.with_reward(0.0) for group in await together(works) for t in group.trajectories]

    batch = make_batch(pool.run(sample()), "grpo")
    assert batch.mask.sum() == groups * SAMPLES * tokens


def per_token(tokens: int, groups: int, repeat: int) -> dict[str, float]:
    """Return microseconds of CPU per sampled token: ours, plain, and the median of their ratios."""
    ours, theirs = [], []
    count = groups * SAMPLES * tokens
    with stubs(1, canned_answer(tokens)) as urls, EnginePool(urls, timeout_s=60) as pool:
        for _ in range(repeat + 1):
            start = time.process_time()
            our_batch(pool, groups, tokens)
            middle = time.process_time()
            plain_batch(urls[0], groups)
            ours.append((middle - start) / count * 1e6)
            theirs.append((time.process_time() - middle) / count * 1e6)
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    found = {"us": statistics.median(ours[1:]), "plain_us": statistics.median(theirs[1:])}
    return found | {"ratio": statistics.median(ratios)}


def rate(engines: int, requests: int, seconds: float = 0.0) -> float:
    """Return requests per second of `requests` requests for one short sample, all sent at once."""
    entry = json.dumps(json.loads(canned_answer(4))[0]).encode()
    sampling = SamplingParams(max_new_tokens=4)
    asked = [GenerationRequest(f"r{at}", PROMPT.tokens, 1, sampling) for at in range(requests)]
    with stubs(engines, entry, seconds) as urls, EnginePool(urls, timeout_s=120) as pool:
        start = time.perf_counter()
        samples = pool.generate(asked)
        elapsed = time.perf_counter() - start
        assert len(samples) == requests and not pool.lost, pool.lost
    return requests / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--unfrozen", action="store_true", help="collect garbage among all objects, as before")
    args = parser.parse_args()
    result: dict[str, object] = {}
    gc.collect()
    if not args.unfrozen:
        gc.freeze()  # as `trainer.bringup.open_run` does
    print(f"{'answer':14} {'us a token':>11} {'plain':>7} {'ratio':>6}")
    for tokens, groups in ((1024, 16), (8192, 2)):
        found = result[f"{SAMPLES}x{tokens}"] = per_token(tokens, groups, args.repeat)
        print(f"{f'{SAMPLES} x {tokens}':14} {found['us']:11.2f} {found['plain_us']:7.2f} {found['ratio']:6.2f}")
    for engines in (1, 8, 64):
        found_rate = result[f"requests_per_s/{engines}"] = rate(engines, 1024)
        print(f"{engines:3} engines: {found_rate:7.0f} requests/s")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    result["in_flight_2048_per_s"] = rate(64, 2048, seconds=2.0)
    print(f"2,048 requests at 64 engines, 1,024 files at first: {result['in_flight_2048_per_s']:.0f} requests/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
