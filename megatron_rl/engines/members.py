"""Control of the engines of a pool together with their states: who is used, paused, quarantined, lost, and back."""

import time
from collections.abc import Callable
from typing import Any

from megatron_rl.engines.control import Controls
from megatron_rl.engines.pooled_engine import EngineState, PooledEngine
from megatron_rl.engines.roster import Roster
from megatron_rl.errors import MegatronRLError

_POLL_S = 0.1


def _use_every_engine(url: str) -> None:
    """Accept every engine."""


class Members(Controls):
    """The engines of a pool.

    Attributes:
        check: raises a MegatronRLError if the engine at a URL, which comes or comes back, is not of use.
        more_may_come: returns whether an engine may come or come back.
        patience_s: seconds that a weight update waits for an engine if none is left.
    """

    _roster: Roster
    check: Callable[[str], None] = staticmethod(_use_every_engine)
    more_may_come: Callable[[], bool] = staticmethod(lambda: False)
    patience_s: float = 0.0

    @property
    def live_urls(self) -> tuple[str, ...]:
        """URLs of the engines that are not lost."""
        return tuple(engine.url for engine in self._roster.live)

    @property
    def quarantined(self) -> dict[str, str]:
        """Engines that get no new request until a weight update succeeds, with the reason."""
        quarantined = (engine for engine in self._roster.engines if engine.state is EngineState.QUARANTINED)
        return {engine.url: engine.quarantined_because for engine in quarantined}

    @property
    def lost(self) -> dict[str, str]:
        """Engines that are not used any more, with the reason."""
        return {engine.url: engine.lost_because for engine in self._roster.engines if not engine.live}

    def wait_healthy(self, timeout_s: float, *, wake: bool = False) -> None:
        """Wait until every live server is healthy. Raise EngineError naming those that are not within `timeout_s`.

        `wake` also resumes servers that are paused: a trainer that was killed during a weight update leaves them
        paused.
        """
        self._run(self._roster.wait_healthy(timeout_s, wake))

    def find_lost(self) -> None:
        """Mark every live server that does not respond as lost. This does not check that the others can generate."""
        self._run(self._roster.find_lost("/model_info"))  # SGLang's /health would add a second to every weight update

    def mark_lost(self, url: str, reason: str) -> None:
        """Mark an engine as lost: no request is sent to it any more."""
        self._run(self._lose(self._roster.find(url), reason))

    async def _lose(self, engine: PooledEngine, reason: str) -> None:
        self._roster.mark_lost(engine, reason)

    def pause(self, url: str, mode: str) -> None:
        """Mark an engine as paused, then pause it. `mode` is that of `Controls.pause`."""
        self._run(self._set(self._roster.find(url), paused=True))
        super().pause(url, mode)

    def resume(self, url: str) -> None:
        """Resume generation, then mark the engine as not paused."""
        super().resume(url)
        self._run(self._set(self._roster.find(url), paused=False))

    def release_memory(self, url: str) -> None:
        """Release the memory of an idle engine, then mark it as offloaded."""
        super().release_memory(url)
        self._run(self._set(self._roster.find(url), offloaded=True))

    def resume_memory(self, url: str) -> None:
        """Let an engine allocate its memory again, then mark it as not offloaded."""
        super().resume_memory(url)
        self._run(self._set(self._roster.find(url), offloaded=False))

    def quarantine(self, url: str, reason: str) -> None:
        """Send no new request to this engine until `admit`. It finishes the requests that it is generating."""
        self._run(self._set(self._roster.find(url), quarantined_because=reason))

    def admit(self, url: str, version: int) -> None:
        """Allow requests to an engine that serves `version`. An older version in a sample shows a restarted engine."""
        self._run(self._set(self._roster.find(url), quarantined_because="", version=version))

    def recover_lost(self) -> tuple[str, ...]:
        """Check the lost engines and quarantine those that are healthy again and of use. Return their URLs.

        They take part in the next weight update. If no engine is left and one may come, wait for it.
        """
        end = time.monotonic() + self.patience_s
        while True:
            back = tuple(url for url in self._run(self._roster.recover_lost()) if self._is_of_use(url))
            if self.live_urls or not self.more_may_come() or time.monotonic() > end:
                return back
            time.sleep(_POLL_S)

    @property
    def has_offloaded(self) -> bool:
        """Whether the memory of an engine is released."""
        return any(engine.offloaded for engine in self._roster.live)

    def _is_of_use(self, url: str) -> bool:
        try:
            self.check(url)
        except MegatronRLError as error:
            self.mark_lost(url, str(error))
            return False
        return True

    def expect(self, url: str, why: str) -> None:
        """Let the next weight update look for a new engine at this URL."""
        self._run(self._expect(url, why))

    async def _expect(self, url: str, why: str) -> None:
        self._roster.expect(url, why)

    def retire(self, url: str, why: str) -> None:
        """Do not look for an engine at this URL any more."""
        self._run(self._retire(url, why))

    async def _retire(self, url: str, why: str) -> None:
        self._roster.retire(url, why)

    async def _set(self, engine: PooledEngine, **values: Any) -> None:
        for name, value in values.items():
            setattr(engine, name, value)

    def _base_url(self, url: str) -> str:
        return self._roster.find(url).url
