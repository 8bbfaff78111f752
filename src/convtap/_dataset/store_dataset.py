"""A store as a data set for training."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.layer_rows import LayerRows
from convtap._dataset.padding import given_axis, padded, time_axis
from convtap._dataset.shard_format import Id
from convtap._dataset.store_reader import StoreReader
from convtap._dataset.views import rows_where
from convtap._errors import InvalidType, InvalidValue, OutOfRange, listed, plural
from convtap._public import public


@public
class StoreDataset(torch.utils.data.Dataset[Any]):
    """A store as a map-style data set of ``(id, {layer: Tensor}[, label])``.

    It holds the samples for which all of its layers ran. A ``DataLoader`` requests whole batches, and the data set reads each
    batch shard by shard.
    """

    def __init__(self, reader: StoreReader, layers: Sequence[LayerRows], labels: Any, time_dim: Any = None) -> None:
        if not layers:
            raise InvalidValue("layers is empty. Pass at least one layer, or None for all.")
        for layer in layers:
            given_axis(layer.name, layer.about, time_dim)
        self._reader = reader
        self._layers = list(layers)
        self._time_dim = time_dim
        self._labels = labels
        self._stored: Any = None
        self._positions: Any = None
        partial = [layer.here for layer in layers if layer.here is not None]
        if partial:
            self._positions = rows_where(reader.index, functools.reduce(operator.and_, partial))
        if labels is None:
            self._stored = _stored_labels(reader)
        elif not callable(labels) and not isinstance(labels, Mapping):
            raise InvalidType(
                f"labels is a {type(labels).__name__}. Pass a dict by id, or a function of the id; for a list in the order of "
                "the ids 0, 1, … write labels=dict(enumerate(labels))."
            )

    def __len__(self) -> int:
        return len(self._reader) if self._positions is None else len(self._positions)

    def __getitem__(self, position: int) -> Any:
        position = self._checked(position)
        if self._positions is not None:
            position = int(self._positions[position])
        id = self._reader.index.ids[position].item()
        outputs = {layer.name: layer.at(position) for layer in self._layers}
        if self._stored is not None:
            return id, outputs, self._stored[position]
        return (id, outputs) if self._labels is None else (id, outputs, self._label(id))

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """Returns a list of samples. Samples of one shard are read together.

        Rows of one shape share one block of memory, which stays alive as long as any of them. Rows of ``Store(copy=False)``
        lie in the memory map.

        Raises:
            OutOfRange: a position is out of range.
        """
        import numpy as np

        places = np.fromiter(map(operator.index, positions), np.int64, len(positions))
        count = len(self)
        wrong = (places < -count) | (places >= count)
        if wrong.any():
            self._checked(int(places[wrong][0]))
        places = np.where(places < 0, places + count, places)
        if self._positions is not None:
            places = self._positions[places]
        ids = self._reader.index.ids[places].tolist()
        outputs: list[dict[str, Tensor]] = [{} for _ in ids]
        for layer in self._layers:
            name = layer.name
            for output, row in zip(outputs, layer.together(places), strict=True):
                output[name] = row
        if self._stored is not None:
            return list(zip(ids, outputs, self._stored[torch.from_numpy(places)].unbind(0), strict=True))
        if self._labels is None:
            return list(zip(ids, outputs, strict=True))
        return list(zip(ids, outputs, map(self._label, ids), strict=True))

    def _checked(self, position: Any) -> int:
        """Returns a position counted from the front."""
        position, count = operator.index(position), len(self)
        if not -count <= position < count:
            raise OutOfRange(
                f"position {position} is out of range, since the data set has {plural(count, 'sample')}. Count from 0, or "
                "from the end with -1."
            )
        return int(position % count)

    def _label(self, id: Id) -> Any:
        if not isinstance(self._labels, Mapping):
            return self._labels(id)
        if id not in self._labels:
            raise InvalidValue(
                f"labels has no entry for the id {id!r}, only for {listed(map(repr, self._labels), 3)}. Add it, or pass a "
                "function of the id."
            )
        return self._labels[id]

    def collate(self, samples: Sequence[Any]) -> Any:
        """Joins samples into ``(ids, {layer: Tensor}, {layer: lengths}[, labels])``.

        Each layer is (B, C, T), or (B, T, C) if its rows are (T, C). T is the longest of the batch. Shorter rows are padded
        with zeros at the end of their time axis, and ``lengths`` (B,) holds the numbers of real frames.

        Raises:
            Unsupported: rows differ in an axis that is not time.
        """
        ids = [sample[0] for sample in samples]
        times = {layer.name: time_axis(layer.name, layer.about, self._time_dim) or -1 for layer in self._layers}
        outputs, lengths = {}, {}
        for layer in samples[0][1]:
            rows = [sample[1][layer] for sample in samples]
            outputs[layer] = padded(layer, rows, times[layer])
            lengths[layer] = torch.tensor([row.shape[times[layer]] if row.dim() else 1 for row in rows])
        if len(samples[0]) == 2:
            return ids, outputs, lengths
        return ids, outputs, lengths, torch.utils.data.default_collate([sample[2] for sample in samples])


def _stored_labels(reader: StoreReader) -> Tensor | None:
    """Returns the extracted labels in the order of the samples, or None."""
    index = reader.index
    found: dict[int, Tensor | None] = {}
    parts = []
    for (_, rows, number, _), begin in zip(index.batches.tolist(), index.begins.tolist(), strict=True):
        labels = found[number] if number in found else found.setdefault(number, reader.shard(number).labels())
        if labels is None:
            return None
        parts.append(labels[begin : begin + rows])
    return torch.cat(parts) if parts else None
