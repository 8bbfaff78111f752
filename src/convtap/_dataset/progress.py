"""What a run will write, against the room there is; and the bar that shows how far it is."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from convtap._dataset.shard_writer import Batch, row_shapes
from convtap._errors import StoreError
from convtap._table import human_bytes


class Progress:
    """A tqdm bar: samples and samples a second, time left, bytes written, and how many there will be.

    Args:
        path: the store.
        total: the samples of this process; None if nobody knows.
        done: how many of them were there already.
        missing: the samples that all processes together have still to write; None if nobody knows.
        even: whether the batches are equal parts of the data in its own order.
    """

    def __init__(
        self, path: Path, *, total: int | None, done: int, missing: int | None, even: bool, show: bool
    ) -> None:
        from tqdm import tqdm

        self._path = path
        self._missing = missing
        self._even = even
        self._forecast: float | None = None
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=f"extract → {path.name}",
            unit=" samples",
            unit_scale=False,
            disable=not show,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, samples: int, written: int) -> None:
        """Shows that samples were computed, and how many bytes are on the disk."""
        about = "" if self._forecast is None else f" of about {human_bytes(self._forecast)}"
        self._bar.set_postfix_str(f"{human_bytes(written)}{about} written", refresh=False)
        self._bar.update(samples)

    def check_room(self, batches: Sequence[Batch]) -> None:
        """Before the first shard is written: estimates from it what all of them need.

        Raises:
            StoreError: that cannot fit on the disk.
        """
        if self._forecast is not None or self._missing is None:
            return
        rows = sum(len(batch.ids) for batch in batches)
        if not rows:
            return
        mean = sum(batch.nbytes for batch in batches) / rows
        self._forecast = mean * self._missing
        free = shutil.disk_usage(self._path).free
        least = mean if self._even and _uniform(batches) else min(_row_bytes(batch) for batch in batches if batch.ids)
        numbers = (
            f"{self._missing} samples of about {human_bytes(mean)} are {human_bytes(self._forecast)}, and "
            f"{str(self._path)!r} has {human_bytes(free)} free"
        )
        remedies = "reduce=lambda t: t.mean(-1), dtype=torch.float16, or fewer layers take less"
        if least * self._missing > free:
            raise StoreError(f"it will not fit: {numbers}. Nothing was written. Give another disk; {remedies}.")
        if self._forecast > free:
            warnings.warn(f"it may not fit: {numbers}. {remedies}.", stacklevel=2)


def _uniform(batches: Sequence[Batch]) -> bool:
    shapes: dict[str, set[Any]] = {}
    for batch in batches:
        for key, rows in batch.columns.items():
            shapes.setdefault(key, set()).update(row_shapes(rows))
    return all(len(found) == 1 for found in shapes.values())


def _row_bytes(batch: Batch) -> float:
    """The least bytes of a sample in a batch."""
    sizes = [0.0] * len(batch.ids)
    for rows in batch.columns.values():
        each = (
            [row.nbytes for row in rows] if isinstance(rows, list) else [rows.nbytes / len(batch.ids)] * len(batch.ids)
        )
        sizes = [total + size for total, size in zip(sizes, each, strict=True)]
    return min(sizes)
