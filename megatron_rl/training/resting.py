"""Engines whose memory is given back while the trainer works alone."""

import json
from pathlib import Path

from megatron_rl.rollout.client import EnginePool


class RestingEngines:
    """Which engines rest, on disk as well: a server that we did not start outlives a killed trainer, resting.

    note: the file that says so. Engines must be resumed exactly once, and SGLang takes a second time badly.
    """

    def __init__(self, note: Path) -> None:
        self.note = note

    def rest(self, pool: EnginePool) -> None:
        """Release the memory of every engine of the pool. Raises EngineError when one refuses."""
        pool.drop_dead()
        for url in pool.live_urls:
            self._write([*self._resting(), url])
            pool.release_memory(url)

    def wake(self, pool: EnginePool) -> None:
        """Have those that rest take their memory again; they generate after the next weight update."""
        resting = self._resting()
        if not resting:
            return
        pool.drop_dead()
        for url in [url for url in pool.live_urls if url in resting]:
            pool.resume_memory(url)
        self.note.unlink()

    def _resting(self) -> list[str]:
        return list(json.loads(self.note.read_text(encoding="utf-8"))) if self.note.is_file() else []

    def _write(self, urls: list[str]) -> None:
        partial = self.note.with_suffix(".partial")
        partial.write_text(json.dumps(urls), encoding="utf-8")
        partial.replace(self.note)
