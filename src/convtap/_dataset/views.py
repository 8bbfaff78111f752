"""Reads a layer of a store by sample, as an array, or as shuffled frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.layer_rows import LayerRows
from convtap._dataset.padding import time_axis
from convtap._dataset.sample_positions import as_array, positions_of
from convtap._dataset.shard_format import Id
from convtap._dataset.store_reader import StoreReader
from convtap._errors import InvalidValue, Unsupported, listed, plural
from convtap._public import public
from convtap._spelling import printable

_POOL_BYTES = 64 * 2**20


@public
class LayerView:
    """A view of one layer's outputs, which are read from disk when it is indexed.

    A read touches only the bytes of its rows. ``view[id]`` is one sample's output, such as (C, T) or (T, C). ``view[ids]``
    is a list of outputs. ``ids`` is a list, an array or a tensor of ids, or a mask of bools. ``view[a:b]`` is a list of
    outputs by position. Iteration yields all outputs.
    """

    def __init__(self, reader: StoreReader, rows: LayerRows) -> None:
        self._reader = reader
        self.name = rows.name
        self._rows = rows
        self._about = rows.about
        self._positions: Any = None if rows.here is None else rows_where(reader.index, rows.here)

    # -- properties

    def __len__(self) -> int:
        return len(self._reader) if self._positions is None else len(self._positions)

    @property
    def ids(self) -> list[Id]:
        """The ids of the samples that the layer ran for, in order."""
        ids = self._reader.index.ids
        return (ids if self._positions is None else ids[self._positions]).tolist()  # type: ignore[no-any-return]

    @property
    def absent(self) -> list[Id]:
        """The ids of the samples that the layer did not run for."""
        index = self._reader.index
        if self._rows.here is None:
            return []
        return index.ids[rows_where(index, ~self._rows.here)].tolist()  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """The number of samples and the shape of a row, with None for an axis that varies.

        The shape is None if the number of axes varies.
        """
        return None if self._about.shape is None else (len(self), *self._about.shape)

    @property
    def time_dim(self) -> int | None:
        """The axis of a row that is time, counted from the end.

        It is -1 for (C, T), -2 for (T, C), and None for rows without time, such as (C,). ``extract`` stores the axis if
        ``lengths``, the layer's type or the timeline determines it. Otherwise it is the only axis that varies between rows.
        If that does not exist either, the last axis is assumed, and the printed view says so.
        """
        return self._about.time_dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        found: torch.dtype = getattr(torch, self._about.dtype.split("|")[0])
        return found

    def __repr__(self) -> str:
        absent = len(self._reader) - len(self)
        note = f", absent for {plural(absent, 'sample')}" if absent else ""
        shape = "of shapes that vary" if self.shape is None else str(self.shape).replace("None", "…")
        return printable(f"<{self.name}: {shape} {self._about.dtype}{self._about.time_note}{note}>")

    # -- reading

    def __getitem__(self, id: Any) -> Any:
        """Returns one output by id, or a list for ids, a mask, or a slice of positions.

        Many outputs are read together, shard by shard, and returned in the order of the ids. A mask has a bool for each
        sample of the view.

        Raises:
            OutOfRange: the store has no sample with this id.
            NotCaptured: the layer did not run for the sample.
            StoreError: several samples have this id, or a shard cannot be read.
            InvalidType, InvalidValue: a list, an array or a mask does not select samples.
        """
        if isinstance(id, (int, str)):
            return self._rows.at(self._reader.position(id))
        if isinstance(id, slice):
            return self._rows.each(self._places(*id.indices(len(self))))
        ids = as_array(id)
        if ids is None:
            return self._rows.at(self._reader.position(id.item() if isinstance(id, Tensor) else id))
        if ids.dtype.kind == "b":
            chosen = positions_of(ids, len(self))
            return self._rows.each(chosen if self._positions is None else self._positions[chosen])
        return self._rows.each(self._reader.positions(ids))

    def __iter__(self) -> Iterator[Tensor]:
        positions = range(len(self)) if self._positions is None else self._positions.tolist()
        return map(self._rows.at, positions)

    def _places(self, start: int, stop: int, step: int = 1) -> Any:
        """Returns the positions in the store of positions in the view."""
        import numpy as np

        places = np.arange(start, stop, step)
        return places if self._positions is None else self._positions[places]

    def numpy(self) -> Any:
        """Returns all rows as one NumPy array; see ``Store.numpy``."""
        import numpy as np

        from convtap._tensors.statistics import to_numpy

        absent = len(self._reader) - len(self)
        if absent:
            raise Unsupported(
                f"layer {self.name!r} did not run for {plural(absent, 'sample')} of {len(self._reader)} "
                f"({listed(map(repr, self.absent), 3)}), so its rows are not an array of all samples. Read them by id: "
                "dict(zip(view.ids, view))."
            )
        shape = self.shape
        if shape is None or None in shape or "|" in self._about.dtype:
            raise Unsupported(
                f"the rows of {self.name!r} differ in shape or dtype ({self!r}), so they are not a single array. Read them "
                f"one by one, or extract with reduce=lambda t: t.mean({self.time_dim or -1})."
            )
        found: Any = None
        step = max(1, _POOL_BYTES // max(1, self._about.elements // max(1, len(self)) * self.dtype.itemsize))
        for first in range(0, max(len(self), 1), step):
            part = to_numpy(self._rows.block(self._places(first, min(first + step, len(self)))))
            if found is None:
                found = np.empty((len(self), *part.shape[1:]), part.dtype)
            found[first : first + len(part)] = part
        return found

    # -- frames

    def frames(self, n: int, shuffle: bool = True, seed: int = 0, time_dim: int | None = None) -> Iterator[Tensor]:
        """Yields every frame once, in batches (n, C); the last one is smaller.

        Use it to train models of single frames, such as k-means and sparse autoencoders. A row (C, T) or (T, C) has T frames,
        and a row (C,) is one frame. With ``shuffle``, rows are read in random order, and frames are drawn from a pool of
        about 64 MiB or 16 batches. A batch then mixes frames of many samples, and memory stays bounded. The same ``seed``
        yields the same batches. Pass another seed for each epoch.

        Args:
            n: the number of frames in a batch.
            shuffle: whether to mix the frames.
            seed: the seed of the random order.
            time_dim: the axis of a row that is time, counted from the end; None for the ``time_dim`` of the view. A warning
                names an axis that is only assumed.

        Raises:
            InvalidValue: ``n`` is not a positive int, or ``time_dim`` is not an axis of the rows.
            Unsupported: the rows have more than two axes, or their channels differ.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidValue(f"n={n!r} is not a positive int. Pass a number of frames in a batch, such as n=4096.")
        shape = self._about.shape
        if shape is None or len(shape) not in (1, 2):
            raise Unsupported(
                f"the rows of {self.name!r} are not (C, T), (T, C) or (C,): {self!r}. Extract rows of one of these shapes, "
                "such as reduce=lambda t: t.flatten(1, -2)."
            )
        time = time_axis(self.name, self._about, time_dim)
        others = [size for place, size in enumerate(shape, -len(shape)) if place != time]
        if None in others:
            raise Unsupported(
                f"the numbers of channels of {self.name!r} differ between rows ({self!r}), so frames cannot be stacked. Pass "
                "time_dim= if another axis is time."
            )
        return self._frames(n, shuffle, seed, time)

    def _frames(self, n: int, shuffle: bool, seed: int, time: int | None) -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        pool: list[Tensor] = []
        held = 0
        limit = n
        for position in self._row_order(shuffle, draw):
            row = self._rows.at(position)
            frames = row[None] if time is None else row.movedim(time, 0).reshape(row.shape[time], -1)
            if not len(frames):
                continue
            pool.append(frames)
            held += len(frames)
            if shuffle:
                limit = max(16 * n, _POOL_BYTES // (frames.shape[1] * frames.element_size()))
            if held >= limit + n:
                rest = _mixed(pool, draw if shuffle else None)
                # half of the pool is yielded, so that new frames mix with the old ones
                count = max((held - limit // 2 if shuffle else held) // n, 1) * n
                yield from torch.split(rest[:count], n)
                pool, held = [rest[count:].clone()], held - count
        if held:
            yield from torch.split(_mixed(pool, draw if shuffle else None), n)

    def _row_order(self, shuffle: bool, draw: torch.Generator) -> Iterator[int]:
        order = torch.randperm(len(self), generator=draw) if shuffle else torch.arange(len(self))
        for chunk in torch.split(order, 1 << 16):
            for row in chunk.tolist():
                yield row if self._positions is None else int(self._positions[row])


def _mixed(pool: list[Tensor], draw: torch.Generator | None) -> Tensor:
    frames = torch.cat(pool)
    return frames if draw is None else frames[torch.randperm(len(frames), generator=draw)]


def rows_where(index: Any, lines: Any) -> Any:
    """Returns the positions of the samples in the selected batches."""
    import numpy as np

    return np.nonzero(np.repeat(lines, index.batches[:, 1]))[0]
