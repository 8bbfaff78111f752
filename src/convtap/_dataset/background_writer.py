"""Writes shards in the background: one is written while the next is filled, and each appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path

from convtap._atomic_write import write_whole
from convtap._dataset.layout import RankFolder
from convtap._dataset.shard_writer import Batch, write_shard
from convtap._errors import StoreError


class Writer:
    """Collects batches into shards. At most two shards are in memory: the one that fills and the one that is written.

    Args:
        folder: where the shards go; it is locked.
        shard_bytes: a shard is closed once it holds as many.
        before: called with a shard's batches before it is handed over; raises to refuse it.

    Attributes:
        written: the bytes of the shards written so far.
    """

    def __init__(self, folder: RankFolder, shard_bytes: int, before: Callable[[list[Batch]], None]) -> None:
        self.written = 0
        self._folder = folder.path
        self._number = folder.next_number()
        self._shard_bytes = shard_bytes
        self._before = before
        self._batches: list[Batch] = []
        self._filled = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed = False

    def add(self, batch: Batch) -> None:
        """Adds a batch, and hands the shard over if it is full now.

        Raises:
            StoreError: a shard could not be written.
        """
        self._batches.append(batch)
        self._filled += batch.nbytes
        if self._filled >= self._shard_bytes:
            self._hand_over()

    def flush(self) -> None:
        """Writes what is there, and returns when it is on the disk."""
        if self._batches:
            self._hand_over()
        self._wait()

    def rescue(self) -> None:
        """Writes what is there although something failed elsewhere; does nothing if the writing itself did."""
        if not self._failed:
            with contextlib.suppress(Exception):
                self.flush()

    def _hand_over(self) -> None:
        self._wait()
        self._failed = True  # until it is known to go well
        self._before(self._batches)
        self._failed = False
        batches, self._batches, self._filled = self._batches, [], 0
        path = self._folder / f"shard-{self._number:06d}.safetensors"
        self._number += 1
        # Not a daemon: an interpreter that exits finishes the shard first.
        self._thread = threading.Thread(target=self._write, args=(path, batches), name="convtap-writer")
        self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self._failed = True
            raise self._error

    def _write(self, path: Path, batches: list[Batch]) -> None:
        try:
            self.written += write_whole(path, lambda temporary: write_shard(temporary, batches))
        except OSError as error:
            self._error = StoreError(_unwritten(path, error))
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error


def _unwritten(path: Path, error: OSError) -> str:
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it cannot be written"
    return (
        f"{str(path)!r}: {why} ({error}). The shards before it are whole: make room (or use reduce=, dtype=, fewer layers "
        "in a new store) and run the same call again; it goes on from there."
    )
