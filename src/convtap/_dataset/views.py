"""Reads a layer of a store: by sample, as frames in random order, and as a data set for training."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.padding import given_axis, padded, time_axis
from convtap._dataset.shard_format import Id
from convtap._dataset.store_reader import StoreReader
from convtap._errors import InvalidType, InvalidValue, NotCaptured, OutOfRange, Unsupported, brief, listed, plural
from convtap._public import public

_POOL_BYTES = 64 * 2**20


@public
class LayerView:
    """One layer's outputs, read from the disk when they are asked for: each read touches its own bytes only.

    ``view[id]`` is one sample's output, such as (C, T) or (T, C); ``view[a:b]`` is a list of them by position; iteration goes
    through all.
    """

    def __init__(self, reader: StoreReader, name: str, key: str) -> None:
        self._reader = reader
        self.name = name
        self._key = key
        index = reader.index
        self._summary = index.layers[key]
        self._here = index.present[:, list(index.layers).index(key)]
        self._positions: Any = None if self._here.all() else _rows_where(index, self._here)

    # -- what it is

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
        return index.ids[_rows_where(index, ~self._here)].tolist()  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """The number of samples and the shape of a row, None for an axis that varies; None if the number of axes does."""
        return None if self._summary.shape is None else (len(self), *self._summary.shape)

    @property
    def time_dim(self) -> int | None:
        """Which axis of a row is time, counted from the end: -1 for (C, T), -2 for (T, C); None if there is none, as in (C,).

        It is known from the cut, the layer's type or the timeline; else it is the only axis that varies between rows, or else
        assumed to be the last one, and the printed view shows that.
        """
        return self._summary.time_dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        found: torch.dtype = getattr(torch, self._summary.dtype.split("|")[0])
        return found

    def __repr__(self) -> str:
        absent = len(self._reader) - len(self)
        note = f", absent for {plural(absent, 'sample')}" if absent else ""
        shape = "of shapes that vary" if self.shape is None else str(self.shape).replace("None", "…")
        return f"<{self.name}: {shape} {self._summary.dtype}{self._summary.time_note}{note}>"

    # -- reading

    def __getitem__(self, id: Any) -> Any:
        """Returns one sample's output by its id, or a list of outputs for a slice of positions.

        Raises:
            OutOfRange: no sample has this id.
            NotCaptured: the layer did not run for it.
        """
        if isinstance(id, slice):
            positions = range(*id.indices(len(self)))
            return [
                self._at(position if self._positions is None else int(self._positions[position]))
                for position in positions
            ]
        if isinstance(id, (list, tuple, Tensor)):
            raise InvalidType(
                f"view[{brief(id)}]: one id at a time, or a slice of positions. Write [view[i] for i in ids]."
            )
        return self._at(self._reader.position(id))

    def __iter__(self) -> Iterator[Tensor]:
        positions = range(len(self)) if self._positions is None else self._positions.tolist()
        return map(self._at, positions)

    def _at(self, position: int) -> Tensor:
        line, shard, place, row = self._reader.index.locate(position)
        if not self._here[line]:
            raise NotCaptured(
                f"layer {self.name!r} did not run for the sample {self._reader.index.ids[position].item()!r}: it ran for "
                f"{len(self)} of {plural(len(self._reader), 'sample')}. view.ids are those, view.absent the others."
            )
        return self._reader.shard(shard).rows(self._key, place, row, row + 1)[0]

    def numpy(self) -> Any:
        """Returns all rows as one NumPy array; see ``Store.numpy``."""
        import numpy as np

        from convtap._tensors.statistics import to_numpy

        absent = len(self._reader) - len(self)
        if absent:
            raise Unsupported(
                f"layer {self.name!r} did not run for {plural(absent, 'sample')} of {len(self._reader)} "
                f"({listed(map(repr, self.absent), 3)}), so it is no full array. Read its rows: dict(zip(view.ids, view))."
            )
        shape = self.shape
        if shape is None or None in shape or "|" in self._summary.dtype:
            raise Unsupported(
                f"the rows of {self.name!r} differ in shape or dtype ({self!r}), so they are no single array. Read them one "
                f"by one, or extract with reduce=lambda t: t.mean({self.time_dim or -1})."
            )
        index, filled = self._reader.index, 0
        found: Any = None
        for _, rows, number, place in index.batches.tolist():
            shard = self._reader.shard(index.names[number])
            stacked = shard.stacked(self._key, place)
            part = to_numpy(torch.stack(shard.rows(self._key, place, 0, rows)) if stacked is None else stacked)
            if found is None:
                found = np.empty((len(self), *part.shape[1:]), part.dtype)
            found[filled : filled + rows] = part
            filled += rows
        return found

    # -- frames

    def frames(self, n: int, shuffle: bool = True, seed: int = 0, time_dim: int | None = None) -> Iterator[Tensor]:
        """Yields every frame once, in batches (n, C); the last one holds the rest.

        For models of single frames, such as k-means and sparse autoencoders. A row (C, T) or (T, C) has T frames, a row (C,) is
        one.
        With ``shuffle`` the rows are read in random order, and their frames are drawn from a pool of about 64 MiB or
        16 batches, so that a batch holds frames of many samples while memory stays bounded. The same ``seed`` yields the
        same batches; use another one for each epoch.

        Args:
            n: frames a batch.
            shuffle: whether to mix the frames.
            seed: of the mixing.
            time_dim: the axis of a row that is time, counted from the end; None for the one that the store has (see
                ``time_dim`` of the view). A warning names an axis that is only assumed.

        Raises:
            InvalidValue: ``n`` is not a positive number, or ``time_dim`` not an axis of the rows.
            Unsupported: the rows have more than two axes, or their channels differ.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidValue(f"n={n!r} must be a positive number of frames a batch, such as 4096.")
        shape = self._summary.shape
        if shape is None or len(shape) not in (1, 2):
            raise Unsupported(
                f"the rows of {self.name!r} are no (C, T) or (C,): {self!r}. Frames are columns of (C, T), or rows of (T, C)."
            )
        time = time_axis(self.name, self._summary, time_dim)
        others = [size for place, size in enumerate(shape, -len(shape)) if place != time]
        if None in others:
            raise Unsupported(f"the channels of {self.name!r} differ between rows ({self!r}), so frames do not stack.")
        return self._frames(n, shuffle, seed, time)

    def _frames(self, n: int, shuffle: bool, seed: int, time: int | None) -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        pool: list[Tensor] = []
        held = 0
        limit = n
        for position in self._row_order(shuffle, draw):
            row = self._at(position)
            frames = row[None] if time is None else row.movedim(time, 0).reshape(row.shape[time], -1)
            if not len(frames):
                continue
            pool.append(frames)
            held += len(frames)
            if shuffle:
                limit = max(16 * n, _POOL_BYTES // (frames.shape[1] * frames.element_size()))
            if held >= limit + n:
                rest = _mixed(pool, draw if shuffle else None)
                # half of the pool goes out, so that new frames mix with the old ones
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


def _rows_where(index: Any, lines: Any) -> Any:
    """Returns the positions of the samples in some of the batches."""
    import numpy as np

    return np.nonzero(np.repeat(lines, index.batches[:, 1]))[0]


@public
class StoreDataset(torch.utils.data.Dataset[Any]):
    """A store as a map-style data set: ``(id, {layer: Tensor})`` by position, or ``(id, {layer: Tensor}, label)``.

    It holds the samples for which every one of its layers ran.
    """

    def __init__(self, reader: StoreReader, views: Sequence[LayerView], labels: Any, time_dim: Any = None) -> None:
        self._views, self._time_dim = list(views), time_dim
        for view in views:
            given_axis(view.name, view._summary, time_dim)
        self._positions = None
        self._labels = labels
        self._stored: Any = None
        if not views:
            raise InvalidValue("layers is empty, so there is nothing to yield. Pass None for all layers.")
        here = views[0]._here
        for view in views:
            here = here & view._here
        self._reader = reader
        if not here.all():
            self._positions = _rows_where(reader.index, here)
        if labels is None:
            self._stored = _stored_labels(reader)
        elif not callable(labels) and not isinstance(labels, Mapping):
            raise InvalidType(
                f"labels is a {type(labels).__name__}, and it must be a dict by id or a function of the id. For a list in "
                "the order of the data set, whose ids are 0, 1, …: labels=dict(enumerate(labels))."
            )

    def __len__(self) -> int:
        return len(self._reader) if self._positions is None else len(self._positions)

    def __getitem__(self, position: int) -> Any:
        position = operator.index(position)
        if not -len(self) <= position < len(self):
            raise OutOfRange(f"there is no position {position}: {plural(len(self), 'sample')} here, counted from 0.")
        position %= len(self)
        if self._positions is not None:
            position = int(self._positions[position])
        id = self._reader.index.ids[position].item()
        outputs = {view.name: view._at(position) for view in self._views}
        if self._stored is not None:
            return id, outputs, self._stored[position]
        if self._labels is None:
            return id, outputs
        return id, outputs, self._label(id)

    def _label(self, id: Id) -> Any:
        if not isinstance(self._labels, Mapping):
            return self._labels(id)
        if id not in self._labels:
            raise InvalidValue(f"labels has nothing for the id {id!r}; it has {listed(map(repr, self._labels), 3)}.")
        return self._labels[id]

    def collate(self, samples: Sequence[Any]) -> Any:
        """Joins samples into a batch: ``(ids, {layer: Tensor}, {layer: lengths}[, labels])``.

        Each layer is (B, C, T), or (B, T, C) if its rows are (T, C), with T the longest of the batch; shorter rows are filled
        with zeros at the end of their time axis, and ``lengths`` (B,) holds the frames that are real.

        Raises:
            Unsupported: rows differ in another axis than the time.
        """
        ids = [sample[0] for sample in samples]
        times = {view.name: time_axis(view.name, view._summary, self._time_dim) or -1 for view in self._views}
        outputs, lengths = {}, {}
        for layer in samples[0][1]:
            rows = [sample[1][layer] for sample in samples]
            outputs[layer] = padded(layer, rows, times[layer])
            lengths[layer] = torch.tensor([row.shape[times[layer]] if row.dim() else 1 for row in rows])
        if len(samples[0]) == 2:
            return ids, outputs, lengths
        return ids, outputs, lengths, torch.utils.data.default_collate([sample[2] for sample in samples])


def _stored_labels(reader: StoreReader) -> Tensor | None:
    """Reads the labels that were extracted, in the order of the samples, or returns None if there are none."""
    index = reader.index
    found: dict[int, Tensor | None] = {}
    parts = []
    for _, rows, number, place in index.batches.tolist():
        shard = reader.shard(index.names[number])
        labels = found[number] if number in found else found.setdefault(number, shard.labels())
        if labels is None:
            return None
        start = sum(count for _, count in shard.batches[:place])
        parts.append(labels[start : start + rows])
    return torch.cat(parts) if parts else None
