"""A progress bar on standard error that no stream can stop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any


class _Stderr:
    """Standard error, which drops text that cannot be written.

    It may be a full disk, a closed pipe, or a file in another encoding.
    """

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def write(self, text: str) -> None:
        stream = sys.stderr
        if stream is None:  # under pythonw
            return
        with contextlib.suppress(OSError, ValueError):
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode("ascii", "backslashreplace").decode())

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return is_watched()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def is_watched() -> bool:
    """Returns whether standard error is a terminal."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or another object
        return bool(sys.stderr.isatty())
    return False


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """Returns a progress bar of tqdm on standard error, with tqdm's options."""
    from tqdm import tqdm

    return tqdm(items, file=_Stderr(), **options)
