"""Engines whose memory is released while the trainer works alone."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import ConfigError
from megatron_rl.files import parse_json, replace_file

OFFLOADED_NAME = "engines_released.json"  # file of the run folder


class OffloadedEngines:
    """Record on disk of the offloaded engines.

    A server that this run did not start keeps running after a trainer is killed, so the next run needs the record. An
    engine must be resumed exactly once, because SGLang crashes on a second request.

    Attributes:
        note: the file that holds the engines' URLs.
    """

    def __init__(self, note: Path) -> None:
        self.note = note

    @property
    def urls(self) -> list[str]:
        """Engines that were offloaded and not resumed since. Raises ConfigError if the note is damaged."""
        if not self.note.is_file():
            return []
        try:
            urls = parse_json(self.note.read_bytes())
            if isinstance(urls, list) and all(isinstance(url, str) for url in urls):
                return urls
            problem = "it is not a list of URLs"
        except ValueError as error:
            problem = str(error)
        raise ConfigError(
            f"{self.note} names the engines whose memory is released, and cannot be read ({problem}): start these "
            "engines again and remove the file"
        )

    def release(self, pool: EnginePool) -> None:
        """Release the memory of every engine of the pool. Raises EngineError if one refuses."""
        pool.find_lost()
        for url in pool.live_urls:
            self._write([*self.urls, url])
            pool.release_memory(url)

    def resume(self, pool: EnginePool) -> None:
        """Let offloaded engines allocate their memory again; they generate after the next weight update.

        Each engine is removed from the note when it has resumed. If an engine reports the state of its memory, the
        state is checked first. An engine that cannot be reached stays in the note.
        """
        offloaded = self.urls
        if not offloaded:
            return
        pool.find_lost()
        for url in [url for url in pool.live_urls if url in offloaded]:
            if pool.memory(url) in ("released", None):
                pool.resume_memory(url)
            self._write(other for other in self.urls if other != url)

    def forget(self) -> None:
        """Delete the note, because the engines have ended and their memory is free."""
        self._write(())

    def print_left(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """On an abnormal exit, print which engines are still offloaded. The arguments are those of `__exit__`."""
        if kind is None or not self.urls:
            return
        urls = ", ".join(self.urls)
        text = f"engines left without their memory: {urls}; --resume of this run lets them allocate it again"
        print(text, file=sys.stderr, flush=True)

    def _write(self, urls: Iterable[str]) -> None:
        left = list(dict.fromkeys(urls))
        if left:
            replace_file(self.note, json.dumps(left).encode())
        else:
            self.note.unlink(missing_ok=True)
