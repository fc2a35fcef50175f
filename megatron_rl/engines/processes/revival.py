"""A run's own servers that have ended are started again, in the background."""

import logging
import threading
import time
from contextlib import suppress

from megatron_rl.engines.pool import EnginePool
from megatron_rl.engines.processes.server_process import ServerProcess, Servers
from megatron_rl.errors import EngineError

_log = logging.getLogger(__name__)
MOST_STARTS = 3  # of one server, after its first one
_POLL_S = 0.5


class Revival:
    """Watches a run's own servers in a thread. A server that ends is started again and gets the next weight update.

    It starts from the model folder, at another port. It gets no request before a weight update has admitted it, so it
    never samples from other weights than the others. The thread also is the parent of what it starts, so it lives
    until `close`.

    Args:
        servers: the servers, healthy.
        pool: the pool over them.
    """

    def __init__(self, servers: Servers, pool: EnginePool) -> None:
        self._servers, self._pool = servers, pool
        self._starts = [0] * servers.count
        self._deadlines: dict[int, float] = {}  # servers that were started and are not healthy yet
        self._given_up: set[int] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="server-revival", daemon=True)
        pool.more_may_come = self._more_may_come
        self._thread.start()

    def close(self) -> None:
        """End the thread. Servers that it has started end with it."""
        self._closed.set()
        self._thread.join()

    def _more_may_come(self) -> bool:
        return len(self._given_up) < self._servers.count

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            with suppress(EngineError):  # the pool is closed before the servers are
                for index in range(self._servers.count):
                    if index not in self._given_up:
                        self._look(index)

    def _look(self, index: int) -> None:
        server = self._servers.process(index)
        code = server.process.poll()
        deadline = self._deadlines.get(index)
        if code is not None:
            self._start(index, f"it ended with code {code}")
        elif deadline is not None and server.is_healthy():
            del self._deadlines[index]
            self._pool.expect(server.url, f"{server.name} was started again")
        elif deadline is not None and time.monotonic() > deadline:
            self._start(index, f"it was not healthy within {self._servers.start_timeout_s:g} s")

    def _start(self, index: int, why: str) -> None:
        """Start a server again, unless it has been started too often or the trainer has its memory."""
        server: ServerProcess = self._servers.process(index)
        self._pool.retire(server.url, why)
        if self._pool.has_offloaded:  # the trainer works alone, in the memory that a server would take
            return
        self._deadlines.pop(index, None)
        if self._starts[index] == MOST_STARTS:
            self._given_up.add(index)
            _log.warning(
                "%s was started again %d times (%s): the run goes on without it, see %s",
                server.name,
                MOST_STARTS,
                why,
                server.log,
            )
            return
        self._starts[index] += 1
        _log.warning("%s is started again (%d of %d): %s", server.name, self._starts[index], MOST_STARTS, why)
        server.restart()
        self._deadlines[index] = time.monotonic() + self._servers.start_timeout_s
