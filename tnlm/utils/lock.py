"""Locks that die with their process: a file that can be locked has no living writer."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import weakref
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int, wait: bool) -> None:
        msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int, wait: bool) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


BUSY = {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of file systems without locks; the process that signed a file then counts as holder."""


class Lock:
    """A lock file that one process at a time can hold.

    Args:
        path: in an existing folder; created when the lock is taken, and never removed by it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "lock"
        >>> mine, other = Lock(path), Lock(path)
        >>> mine.take(), other.take()
        (True, False)
        >>> mine.close()
    """

    def __init__(self, path: Path) -> None:
        """Start without the lock."""
        self.path = path
        self._handles: list[int] = []
        weakref.finalize(self, _close, self._handles)

    def take(self, *, wait: bool = False) -> bool:
        """Take the lock and sign the file; return False if another process holds it.

        Raises:
            OSError: if the file cannot be created.
        """
        while True:
            self._handles.append(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666))
            if not self._try(wait):
                self.close()
                return False
            if self.stands():
                break
            self.close()  # its last holder removed or replaced the file: try again
        os.truncate(self.path, 0)
        os.write(self._handles[-1], f"process {os.getpid()} on {socket.gethostname()}".encode())
        return True

    def _try(self, wait: bool) -> bool:
        try:
            _lock(self._handles[-1], wait)
        except OSError as error:
            if error.errno in UNKNOWN:
                return not self._lives()
            if error.errno in BUSY:
                return False
            raise
        return True

    def stands(self) -> bool:
        """Return whether this holds the lock, and the file still exists under its name."""
        try:
            return bool(self._handles) and os.path.samestat(
                os.fstat(self._handles[-1]), self.path.stat()
            )
        except FileNotFoundError:
            return False

    def holder(self) -> str:
        """Return the name of the process that took the lock last."""
        with contextlib.suppress(OSError, ValueError):
            return self.path.read_text(encoding="utf-8") or "another process"
        return "another process"

    def _lives(self) -> bool:
        """Return whether the process that signed may still run, as far as this host knows."""
        words = self.holder().split(maxsplit=3)
        if len(words) < 4 or words[3] != socket.gethostname():
            return len(words) == 4
        try:
            os.kill(int(words[1]), 0)
        except (OSError, ValueError):
            return False
        return True

    def close(self) -> None:
        """Release the lock."""
        _close(self._handles)


def _close(handles: list[int]) -> None:
    while handles:
        with contextlib.suppress(OSError):
            os.close(handles.pop())
