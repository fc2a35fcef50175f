"""A folder that one process at a time works in."""

import fcntl
from pathlib import Path
from typing import IO


def claim(lock: Path, *, new: bool = True) -> IO[bytes] | None:
    """A lock file held as long as this process lives or until it is closed, in whichever container.

    None where another process holds it. Raises OSError where it cannot be opened (with `new` false also where it is not
    there) or the file system knows no locks.
    """
    file = lock.open("ab" if new else "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file
