"""A folder that one process at a time works in."""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import IO


def claim(lock: Path, *, new: bool = True) -> IO[bytes] | None:
    """A lock file held as long as this process lives or until it is closed, in whichever container.

    None where another process holds it, where it cannot be opened, or where it is not there and not to be made (`new`).
    """
    with suppress(OSError):
        file = lock.open("ab" if new else "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            file.close()
    return None
