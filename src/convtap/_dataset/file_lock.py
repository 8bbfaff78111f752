"""Locks a file for one process, on POSIX and on Windows."""

from __future__ import annotations

import errno
import os

#: A locked file's error: of POSIX record locks (either), and of Windows.
_IS_LOCKED = {errno.EAGAIN, errno.EACCES}

#: The locked byte on Windows, far behind the owner's name, so that other processes can read the name.
_PLACE = 1 << 20


def lock_file(handle: int) -> bool:
    """Locks an open file until it is closed.

    Returns:
        Whether this process has the lock. If not, another process has it.

    Raises:
        OSError: the file cannot be locked, as on a network file system without locks.
    """
    try:
        _lock(handle)
    except OSError as error:
        if error.errno not in _IS_LOCKED:
            raise
        return False
    return True


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(handle, _PLACE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
