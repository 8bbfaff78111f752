"""Writes files atomically, so that a file is complete or does not exist."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_IS_WINDOWS = os.name == "nt"

#: The glob that temporary names match.
TEMPORARY = ".*.part"

# Note: [Whole files]
# Assumption: a reader, or a resumed run, treats any file with the right name as complete.
# Failure: a process that dies while it writes leaves half a file. After a power cut, a renamed file may be empty.
# Choice: write under a temporary name in the same folder, sync the content to the disk, rename, then sync the folder.
#   Temporary names match ``TEMPORARY``, so that the next run in a store finds and removes those of a killed run.


def write_whole(path: Path, write: Callable[[Path], T], *, replace: bool = True) -> T:
    """Writes a file atomically. See Note: [Whole files].

    Args:
        path: the file.
        write: a function that writes the content to the path that it receives, which is a temporary one.
        replace: whether to replace an existing file.

    Returns:
        The result of ``write``.

    Raises:
        FileExistsError: ``replace`` is False and the file exists.
        OSError: the disk is full, or the file cannot be written.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.part"
    try:
        # created here, and not by ``write``, so that it has the permissions that the user's umask allows
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        permissions = temporary.stat().st_mode & 0o777
        result = write(temporary)
        os.chmod(temporary, permissions)
        _sync(temporary, os.O_RDWR)
        (replace_file if replace else _link)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return result


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to the disk, if the system supports it."""
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        _flush(handle)
    finally:
        os.close(handle)


def _flush(handle: int) -> None:
    """Forces written content to the disk.

    On macOS, fsync leaves it in the drive's own memory.
    """
    try:
        import fcntl

        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined, unused-ignore]
    except (ImportError, AttributeError, OSError):  # not macOS, or a file system that cannot do it
        os.fsync(handle)


def replace_file(old: Path, new: Path) -> None:
    """Renames a file, and replaces an existing file of the new name.

    On Windows, where another program may have that file open, it tries again for a moment.

    Raises:
        OSError: it cannot be renamed; on Windows, one that a program has open or mapped cannot be replaced.
    """
    for seconds in (0.01, 0.1, 0.5) if _IS_WINDOWS else ():
        try:
            os.replace(old, new)
        except PermissionError:
            time.sleep(seconds)
        else:
            return
    os.replace(old, new)


def _link(temporary: Path, path: Path) -> None:
    """Renames a file, or raises FileExistsError if another process was first."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # without links in the file system, another process may be first between this check and the rename
        if path.exists():
            raise FileExistsError(str(path)) from None
        replace_file(temporary, path)
