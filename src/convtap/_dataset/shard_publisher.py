"""Makes shards visible in a store: written in the background, each appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from convtap._atomic_write import write_whole
from convtap._dataset.layout import RankFolder
from convtap._dataset.shard_format import Batch, write_shard
from convtap._errors import StoreError, warn_user
from convtap._table import human_bytes


class ShardPublisher:
    """Collects batches into shards. At most two shards are in memory: the one that fills and the one that is written.

    Args:
        folder: where the shards go; it is locked.
        shard_bytes: a shard is closed once it holds as many.
        missing: the samples that all processes together have still to write; None if it is not known.
        before: called before a shard is written; raises to refuse it.

    Attributes:
        written: the bytes of the shards written so far.
        forecast: the bytes of all missing samples, estimated from the first shard; None before that, or if it is not known.
    """

    def __init__(self, folder: RankFolder, shard_bytes: int, missing: int | None, before: Callable[[], None]) -> None:
        self.written = 0
        self.forecast: float | None = None
        self._folder = folder.path
        self._number = folder.next_number()
        self._shard_bytes = shard_bytes
        self._missing = missing
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
        """Writes the batches of the open shard, and returns when they are on the disk."""
        if self._batches:
            self._hand_over()
        self._wait()

    def rescue(self) -> None:
        """Writes the open shard although something failed elsewhere; does nothing if the writing itself did."""
        if not self._failed:
            with contextlib.suppress(Exception):
                self.flush()

    def _hand_over(self) -> None:
        self._wait()
        self._failed = True  # until it is known to go well
        if self.forecast is None and self._missing is not None:
            self.forecast = _check_room(self._folder.parent, self._batches, self._missing)
        self._before()
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
            # from here on the shard is visible: readers and resumed runs take any file of this name for a whole one
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


def _check_room(store: Path, batches: Sequence[Batch], missing: int) -> float | None:
    """Estimates from the first shard what all missing samples need: hours of computing are lost on a disk that is too small.

    Returns:
        Their bytes; None if the shard has no samples.

    Raises:
        StoreError: even samples as small as the smallest here do not fit.
    """
    rows = sum(len(batch.ids) for batch in batches)
    if not rows:
        return None
    mean = sum(batch.nbytes for batch in batches) / rows
    forecast, free = mean * missing, shutil.disk_usage(store).free
    numbers = (
        f"{missing} samples of about {human_bytes(mean)} are {human_bytes(forecast)}, and "
        f"{str(store)!r} has {human_bytes(free)} free"
    )
    remedies = "reduce=lambda t: t.mean(-1), dtype=torch.float16, or fewer layers take less"
    if min(_least(batch) for batch in batches if batch.ids) * missing > free:
        raise StoreError(f"it will not fit: {numbers}. Nothing was written. Give another disk; {remedies}.")
    if forecast > free:
        warn_user(f"it may not fit: {numbers}. {remedies}.", UserWarning)
    return forecast


def _least(batch: Batch) -> float:
    """Returns the fewest bytes that a sample of a batch can have."""
    return sum(
        rows.nbytes / len(batch.ids) if isinstance(rows, Tensor) else min(row.nbytes for row in rows)
        for rows in batch.columns.values()
    )
