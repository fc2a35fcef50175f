"""Engines whose memory is given back while the trainer works alone."""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_rl.engines.pool import EnginePool


class RestingEngines:
    """Which engines rest, on disk as well: a server that we did not start outlives a killed trainer, resting.

    note: the file that says so. Engines must be resumed exactly once, and SGLang takes a second time badly.
    """

    def __init__(self, note: Path) -> None:
        self.note = note

    @property
    def urls(self) -> list[str]:
        """Engines that were put to rest and not woken since."""
        return list(json.loads(self.note.read_text(encoding="utf-8"))) if self.note.is_file() else []

    def rest(self, pool: EnginePool) -> None:
        """Release the memory of every engine of the pool. Raises EngineError when one refuses."""
        pool.drop_dead()
        for url in pool.live_urls:
            self._write([*self.urls, url])
            pool.release_memory(url)

    def wake(self, pool: EnginePool) -> None:
        """Have those that rest take their memory again; they generate after the next weight update.

        Each is noted as it wakes, and asked beforehand where it knows; one that cannot be reached stays noted.
        """
        resting = self.urls
        if not resting:
            return
        pool.drop_dead()
        for url in [url for url in pool.live_urls if url in resting]:
            if pool.memory(url) in ("released", None):
                pool.resume_memory(url)
            self._write(other for other in self.urls if other != url)

    def forget(self) -> None:
        """The engines that were noted are gone, and what they held with them."""
        self._write(())

    def _write(self, urls: Iterable[str]) -> None:
        left = list(dict.fromkeys(urls))
        if not left:
            self.note.unlink(missing_ok=True)
            return
        partial = self.note.with_suffix(".partial")
        partial.write_text(json.dumps(left), encoding="utf-8")
        partial.replace(self.note)
