"""Writes shards in the background, so that each appears whole or not at all."""

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
    """Collects batches into shards, which a thread writes.

    At most two shards are in memory: the open one and the one being written.

    Args:
        folder: the locked folder of the shards.
        shard_bytes: the size at which a shard is closed.
        missing: the number of samples that all processes together have yet to write; None if unknown.
        before: called before a shard is written; it may raise an error to refuse the shard.

    Attributes:
        written: the bytes of the shards written so far.
        forecast: the bytes of all missing samples, estimated from the first shard; None before that, or if unknown.
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
        """Adds a batch, and starts to write the shard if it is full.

        Raises:
            StoreError: a shard could not be written.
        """
        self._batches.append(batch)
        self._filled += batch.nbytes
        if self._filled >= self._shard_bytes:
            self._hand_over()

    def flush(self) -> None:
        """Writes the open shard. Returns when it is on the disk."""
        if self._batches:
            self._hand_over()
        self._wait()

    def rescue(self) -> None:
        """Writes the open shard after an error elsewhere; does nothing if writing failed."""
        if not self._failed:
            with contextlib.suppress(Exception):
                self.flush()

    def _hand_over(self) -> None:
        self._wait()
        self._failed = True  # until the checks have passed
        if self.forecast is None and self._missing is not None:
            self.forecast = _check_room(self._folder.parent, self._batches, self._missing)
        self._before()
        self._failed = False
        batches, self._batches, self._filled = self._batches, [], 0
        path = self._folder / f"shard-{self._number:06d}.safetensors"
        self._number += 1
        # not a daemon, so that an interpreter finishes the shard before it exits
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
            # then the shard is visible, since readers and resumed runs assume that a file of this name is whole
            self.written += write_whole(path, lambda temporary: write_shard(temporary, batches))
        except OSError as error:
            self._error = StoreError(_unwritten(path, error))
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error


def _unwritten(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{str(path)!r} cannot be written, since the disk is full ({error}). Make room and run the same call again to "
            "resume, or begin a new store with reduce=, dtype= or fewer layers."
        )
    return f"{str(path)!r} cannot be written: {error}. Check the disk, and run the same call again to resume."


def _check_room(store: Path, batches: Sequence[Batch], missing: int) -> float | None:
    """Estimates the bytes of all missing samples from the first shard.

    The check at the beginning saves hours of computing for a disk that is too small.

    Returns:
        The bytes, or None if the shard has no samples.

    Raises:
        StoreError: samples as small as the smallest here would not fit.
    """
    rows = sum(len(batch.ids) for batch in batches)
    if not rows:
        return None
    mean = sum(batch.nbytes for batch in batches) / rows
    forecast, free = mean * missing, shutil.disk_usage(store).free
    numbers = (
        f"{missing} samples of about {human_bytes(mean)} take {human_bytes(forecast)}, but "
        f"{str(store)!r} has {human_bytes(free)} free"
    )
    remedy = "Use another disk, or extract less: reduce=lambda t: t.mean(-1), dtype=torch.float16, or fewer layers."
    if min(_least(batch) for batch in batches if batch.ids) * missing > free:
        raise StoreError(f"the outputs do not fit on the disk, and nothing was written: {numbers}. {remedy}")
    if forecast > free:
        warn_user(f"the outputs may not fit on the disk: {numbers}. {remedy}", UserWarning)
    return forecast


def _least(batch: Batch) -> float:
    """Returns the fewest bytes that a sample of a batch may take."""
    return sum(
        rows.nbytes / len(batch.ids) if isinstance(rows, Tensor) else min(row.nbytes for row in rows)
        for rows in batch.columns.values()
    )
