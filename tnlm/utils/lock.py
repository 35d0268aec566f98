"""Locks that die with their process: who can lock a file knows that its writer is gone."""

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
"""What file systems without locks say; who signed a file then counts as its holder."""


class Lock:
    """A file that one process at a time can hold.

    Args:
        path: in a folder that is there; made when the lock is taken, and never removed by it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "lock"
        >>> mine, other = Lock(path), Lock(path)
        >>> mine.take(), other.take()
        (True, False)
        >>> mine.close()
    """

    def __init__(self, path: Path) -> None:
        """Hold nothing yet."""
        self.path = path
        self._handles: list[int] = []
        weakref.finalize(self, _close, self._handles)

    def take(self, *, wait: bool = False) -> bool:
        """Take the lock, until it is closed, and sign it; return False if another has it.

        Raises:
            OSError: if the file cannot be made.
        """
        while True:
            self._handles.append(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666))
            if not self._try(wait):
                self.close()
                return False
            if self.stands():
                break
            self.close()  # who held it has removed or replaced the file: a new one is made
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
        """Whether this holds the lock, and its file still has its name."""
        try:
            return bool(self._handles) and os.path.samestat(
                os.fstat(self._handles[-1]), self.path.stat()
            )
        except FileNotFoundError:
            return False

    def holder(self) -> str:
        """Return who took the lock last."""
        with contextlib.suppress(OSError, ValueError):
            return self.path.read_text(encoding="utf-8") or "another process"
        return "another process"

    def _lives(self) -> bool:
        """Whether the one who signed may still run, as far as this host can tell."""
        words = self.holder().split(maxsplit=3)
        if len(words) < 4 or words[3] != socket.gethostname():
            return len(words) == 4
        try:
            os.kill(int(words[1]), 0)
        except (OSError, ValueError):
            return False
        return True

    def close(self) -> None:
        """Let others take it."""
        _close(self._handles)


def _close(handles: list[int]) -> None:
    while handles:
        with contextlib.suppress(OSError):
            os.close(handles.pop())
