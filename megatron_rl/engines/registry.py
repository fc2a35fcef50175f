"""Engines found through a folder of ready files, so that engines may come, go and come back elsewhere."""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from megatron_rl.engines.roster import Roster
from megatron_rl.errors import EngineError
from megatron_rl.protocol.ready_file import read_ready_file

_log = logging.getLogger(__name__)
_POLL_S = 1.0
_RESPONSE_S = 5.0


class Registry:
    """A folder in which engines register.

    Args:
        folder: the folder, `rollout.urls_dir`; it may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._refused: set[str] = set()  # files that were named in a warning

    def read(self) -> dict[str, Any]:
        """Return URL -> identity of the process there. A file that names no URL is left out."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                url, process = read_ready_file(path)
                found[url] = process
            except FileNotFoundError:  # it was removed meanwhile
                continue
            except (OSError, ValueError) as error:
                if path.name not in self._refused:
                    self._refused.add(path.name)
                    _log.warning("%s names no engine (%s: %s)", path, type(error).__name__, error)
        return found

    def wait(self, count: int, timeout_s: float, headers: dict[str, str]) -> list[str]:
        """Return the URLs of engines that respond, once there are enough.

        Args:
            count: number of engines to wait for.
            timeout_s: time limit in seconds.
            headers: headers of the requests.

        Raises:
            EngineError: fewer engines respond in time.
        """
        end = time.monotonic() + timeout_s
        with httpx.Client(timeout=_RESPONSE_S, headers=headers, trust_env=False) as http:
            while True:
                registered = list(self.read())
                ready = [url for url in registered if _responds(http, url)]
                if len(ready) >= count:
                    return ready
                if time.monotonic() > end:
                    raise EngineError(
                        f"{len(ready)} of {count} engines (rollout.servers) respond after {timeout_s:g} s; registered "
                        f"in {self.folder} (rollout.urls_dir): {', '.join(registered) or 'none'}: start them with "
                        "`serve --ready-file` there, raise rollout.start_timeout_s, or correct rollout.api_key_file"
                    )
                time.sleep(_POLL_S)

    async def watch(self, roster: Roster) -> None:
        """Add engines that came to the roster, and remove those that went. Never returns. For the pool's loop."""
        known = {engine.url: None for engine in roster.engines}
        while True:
            found = await asyncio.to_thread(self.read)
            for url in known.keys() - found.keys():
                roster.retire(url, f"its file is not in {self.folder} any more")
            for url, process in found.items():
                if url not in known:
                    roster.expect(url, "it has just registered")
                elif known[url] not in (None, process):
                    roster.expect(url, "another process has registered there")
            known = found
            await asyncio.sleep(_POLL_S)


def _responds(http: httpx.Client, url: str) -> bool:
    with suppress(httpx.HTTPError):
        return http.get(f"{url}/model_info").status_code == 200  # an engine that was left paused responds, too
    return False
