"""HTTP server of the embedded engine, with SGLang's contract: `megatron-rl serve --model FOLDER --port P`."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_rl.errors import MegatronRLError, UserError
from megatron_rl.files import parse_json
from megatron_rl.protocol.api_key import is_loopback, read_key
from megatron_rl.protocol.bodies import (
    AbortBody,
    BeginUpdateBody,
    ChecksumBody,
    DistributedBody,
    EmptyBody,
    GenerateBody,
    JoinGroupBody,
    LeaveGroupBody,
    MemoryBody,
    PauseBody,
    SaveBody,
    TensorBody,
    UpdateBody,
    explain,
)
from megatron_rl.protocol.generation import to_json
from megatron_rl.protocol.payload import unpack_payload
from megatron_rl.protocol.ready_file import WILDCARDS, remove_ready_file, write_ready_file
from megatron_rl.protocol.server_options import ServerOptions, describe_precision
from megatron_rl.server.access import Access, RequireKey
from megatron_rl.server.decode_batch import Job
from megatron_rl.server.engine import Engine, JobFailed
from megatron_rl.server.http_limits import BodyLimits, TimedProtocol
from megatron_rl.server.requests import parse_jobs, response_entries
from megatron_rl.server.weight_updates import UpdateGroups
from megatron_rl.server.workers import Workers
from megatron_rl.supervise import block_stops, die_with_parent, raise_file_limit

_MANY = 1 << 14  # tokens of a response that is written in a thread


def create_app(engine: Engine, access: Access = Access()) -> FastAPI:  # noqa: B008  (frozen)
    """Return the HTTP application of a started engine. A bad request gets status 400 and an error naming the field."""

    workers = Workers()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)
        workers.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(BodyLimits)
    if access.key is not None:
        app.add_middleware(RequireKey, key=access.key)

    @app.exception_handler(MegatronRLError)
    async def refused(_: Request, error: Exception) -> Response:
        return _failure(str(error), 503 if not engine.healthy else 500 if isinstance(error, JobFailed) else 400)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _failure(explain(error.errors()), 400)

    @app.exception_handler(HTTPException)
    async def unreadable(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _failure(str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return _failure(f"a fault of the server: {type(error).__name__}: {str(error)[:300]}", 500)

    _add_generation(app, engine, workers, access)
    _add_control(app, engine, workers, access)
    _add_updates(app, engine, workers)
    _add_update_groups(app, engine.updates.groups, workers)
    return app


def _failure(message: str, status: int) -> Response:
    message = message.encode("utf-8", "replace").decode()  # it may quote what cannot be sent
    return JSONResponse({"success": False, "message": message, "error": {"message": message}}, status)


def _done(message: str = "ok", **more: Any) -> Response:
    return JSONResponse({"success": True, "message": message, **more})


def _add_generation(app: FastAPI, engine: Engine, workers: Workers, access: Access) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not engine.healthy:
            return _failure(f"the engine has stopped: {engine.failure}", 503)
        return _done()

    @app.get("/model_info")
    async def model_info() -> Response:
        if not engine.healthy:
            return _failure(f"the engine has stopped: {engine.failure}", 503)
        return JSONResponse(
            {
                "model_path": str(engine.model_dir),
                "tokenizer_path": str(engine.model_dir) if engine.tokenizer is not None else None,
                "is_generation": True,
                "weight_version": engine.weight_version,
                "engine": "embedded",
                **describe_precision(engine.dtype, engine.engine_quantization),
                "deterministic": engine.deterministic,
                "paused": engine.paused,
                "memory": engine.memory,
                "save_dirs": [str(folder.absolute()) for folder in access.save_dirs],
            }
        )

    async def generate(request: Request) -> Response:
        try:
            body = await _generate_body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        # Requests of a training step have one prompt. They are read here, because a thread would cost more.
        jobs = await workers.quick(parse_jobs, engine, body) if body.batched else parse_jobs(engine, body)
        finished = asyncio.gather(*(asyncio.wrap_future(future) for future in engine.submit(jobs)))
        left = asyncio.create_task(_client_left(request))
        racing: set[asyncio.Future[Any]] = {finished, left}
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            await workers.quick(engine.abort, {job.rid for job in jobs})
            with suppress(JobFailed):
                await finished
            return Response(status_code=499)
        left.cancel()
        done = await finished
        tokens = sum(len(row.tokens) for job in done for row in job.rows)
        content = _content(engine, done, body) if tokens < _MANY else await workers.quick(_content, engine, done, body)
        return Response(content, media_type="application/json")

    app.add_route("/generate", generate, methods=["POST"])  # FastAPI's own reading costs more than a small request


async def _generate_body(request: Request) -> GenerateBody:
    """Return the body of a /generate request. Raise UserError naming the first invalid fields."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page in a browser may send any other type to loopback
        raise UserError(f"the body's content-type is '{kind}': send application/json")
    try:
        return GenerateBody.model_validate(parse_json(await request.body()))
    except ValidationError as error:
        raise UserError(explain(error.errors())) from error
    except ValueError as error:
        raise UserError(f"the body is not JSON: {error}") from error


def _content(engine: Engine, jobs: Sequence[Job], body: GenerateBody) -> bytes:
    entries = [entry for job in jobs for entry in response_entries(engine, job, body)]
    return to_json(entries if body.batched or len(entries) > 1 else entries[0])


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_control(app: FastAPI, engine: Engine, workers: Workers, access: Access) -> None:
    @app.post("/pause_generation")
    async def pause_generation(body: PauseBody) -> Response:
        await workers.quick(engine.pause, body.mode)
        return _done(f"paused ({body.mode})")

    @app.post("/continue_generation")
    async def continue_generation(body: EmptyBody | None = None) -> Response:
        await workers.quick(engine.resume)
        return _done()

    @app.post("/abort_request")
    async def abort_request(body: AbortBody) -> Response:
        ended = await workers.quick(engine.abort, None if body.rid is None else {body.rid})
        return _done(f"{ended} requests aborted", aborted=ended)

    @app.post("/flush_cache")
    async def flush_cache(body: EmptyBody | None = None) -> Response:
        await workers.quick(engine.flush)
        return _done()

    @app.post("/update_weights_from_disk")
    async def update_weights_from_disk(body: UpdateBody) -> Response:
        if body.flush_cache:
            await workers.quick(engine.flush)
        await workers.slow(engine.update_from_disk, Path(body.model_path), body.weight_version)
        return _done(f"serving weight version {body.weight_version}", weight_version=body.weight_version)

    @app.post("/release_memory_occupation")
    async def release_memory_occupation(body: MemoryBody | None = None) -> Response:
        if body is None or body.weights:
            await workers.quick(engine.release_memory)
        return _done()

    @app.post("/resume_memory_occupation")
    async def resume_memory_occupation(body: MemoryBody | None = None) -> Response:
        if body is None or body.weights:
            await workers.quick(engine.resume_memory)
        return _done()

    @app.post("/weights_checker")
    async def weights_checker(body: ChecksumBody) -> Response:
        version, digests = await workers.quick(engine.checksums)
        return _done(weight_version=version, checksums=digests)

    @app.post("/save_weights")
    async def save_weights(body: SaveBody) -> Response:
        version = await workers.slow(lambda: engine.save_weights(access.check_place(Path(body.path))))
        return _done(weight_version=version)


def _add_updates(app: FastAPI, engine: Engine, workers: Workers) -> None:
    """Add the calls for weights in buckets. Unlike SGLang, the engine serves none of them before the update ends."""
    updates = engine.updates

    @app.post("/begin_weight_update")
    async def begin_weight_update(body: BeginUpdateBody | None = None) -> Response:
        await workers.slow(updates.begin)
        return _done()

    @app.post("/end_weight_update")
    async def end_weight_update(body: EmptyBody | None = None) -> Response:
        await workers.slow(updates.end)
        return _done(f"serving weight version {engine.weight_version}", weight_version=engine.weight_version)

    @app.post("/abort_weight_update")
    async def abort_weight_update(body: EmptyBody | None = None) -> Response:
        await workers.slow(updates.abort)
        return _done(f"serving weight version {engine.weight_version}", weight_version=engine.weight_version)

    @app.post("/update_weights_from_distributed")
    async def update_weights_from_distributed(body: DistributedBody) -> Response:
        if body.flush_cache:
            await workers.quick(engine.flush)
        flat = body.load_format == "flattened_bucket"
        await workers.slow(
            updates.receive,
            body.group_name,
            body.names,
            body.torch_dtypes,
            body.shapes,
            flat=flat,
            version=body.weight_version,
        )
        return _done()

    @app.post("/update_weights_from_tensor")
    async def update_weights_from_tensor(body: TensorBody) -> Response:
        if body.flush_cache:
            await workers.quick(engine.flush)

        def load() -> None:
            updates.load(unpack_payload(body.serialized_named_tensors[0]), body.weight_version)

        await workers.slow(load)
        return _done()


def _add_update_groups(app: FastAPI, groups: UpdateGroups, workers: Workers) -> None:
    """Add the calls that join and leave the process group of broadcast weights."""

    @app.post("/init_weights_update_group")
    async def init_weights_update_group(body: JoinGroupBody, request: Request) -> Response:
        work = partial(
            groups.join,
            body.group_name,
            body.master_address,
            body.master_port,
            rank=body.rank_offset,
            world=body.world_size,
            backend=body.backend,
        )
        joining, left = asyncio.ensure_future(workers.join(work)), asyncio.create_task(_client_left(request))
        racing: set[asyncio.Future[Any]] = {joining, left}
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            joining.cancel()  # if it has not begun, it never will
            return Response(status_code=499)
        left.cancel()
        await joining
        return _done()

    @app.post("/destroy_weights_update_group")
    async def destroy_weights_update_group(body: LeaveGroupBody) -> Response:
        await workers.slow(groups.leave, body.group_name)
        return _done()


def run_server(options: ServerOptions) -> None:
    """Load the model and serve it until SIGTERM or SIGINT. Requests that still run then end as aborted.

    Raises UserError if everybody on a network could use the server.
    """
    access = Access(None if options.api_key_file is None else read_key(options.api_key_file), options.save_dirs)
    _check_address(options.host, access)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    if options.parent_pid:
        block_stops()  # the run that started this server ends it
        die_with_parent(options.parent_pid)
    engine = Engine(
        options.model,
        options.dtype,
        options.threads,
        options.deterministic,
        options.weight_version,
        options.device,
        options.max_rows,
        engine_quantization=options.quantization,
    ).start()
    config = uvicorn.Config(
        create_app(engine, access),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # no address of a client is used, and reading the headers costs time
        # If the server closes a kept-alive connection first, the client treats the server as failed.
        timeout_keep_alive=3600,
        timeout_graceful_shutdown=2,
        http=TimedProtocol,
        ws="none",
    )
    try:
        _Server(config, options).run()
    finally:
        engine.stop()


def _check_address(host: str, access: Access) -> None:
    if not is_loopback(host) and access.key is None:
        raise UserError(
            f"--host {host} can be reached from other machines, and whoever reaches the server may change its weights: "
            "give a key with --api-key-file, and the same file to the run as rollout.api_key_file"
        )
    if host in WILDCARDS:
        print(f"warning: --host {host} listens on all interfaces; name one address", file=sys.stderr, flush=True)


class _Server(uvicorn.Server):
    """Writes the ready file once requests are accepted, and removes it when they are not accepted any more."""

    def __init__(self, config: uvicorn.Config, options: ServerOptions) -> None:
        super().__init__(config)
        self._options = options

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self._options.ready_file is not None and not self.should_exit:
            write_ready_file(self._options.ready_file, self._options.host, self._options.port)

    async def shutdown(self, sockets: Any = None) -> None:
        if self._options.ready_file is not None:
            remove_ready_file(self._options.ready_file)
        await super().shutdown(sockets)
