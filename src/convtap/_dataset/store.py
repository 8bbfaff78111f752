"""The public ``Store``, which reads extracted outputs by layer and sample."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from convtap._dataset.layer_rows import LayerRows
from convtap._dataset.layout import read_padding
from convtap._dataset.shard_format import Id
from convtap._dataset.store_dataset import StoreDataset
from convtap._dataset.store_reader import StoreReader
from convtap._dataset.summary import missing, stem, summary, unreadable
from convtap._dataset.verify import verify
from convtap._dataset.views import LayerView
from convtap._errors import AmbiguousCall, InvalidType, LayerNotFound, did_you_mean, listed, warn_user
from convtap._public import public
from convtap._select.parts import split_key
from convtap._table import MOST, Table


@public
class Store:
    """Reads the outputs that ``extract`` wrote, by layer and sample id.

    Examples:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from convtap import Store, extract
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> folder = tempfile.mkdtemp()
        >>> store = extract(model, TensorDataset(torch.randn(10, 1, 50)), folder, batch_size=4, progress=False)
        >>> Store(folder)["2"][7].shape
        torch.Size([8, 46])

    Args:
        path: the directory that ``extract`` wrote.
        mmap: whether to read shards through memory maps. False reads them with read calls. None maps them unless they are on
            a network file system, or on one without memory maps.
        copy: whether every row that is read owns its memory. If False, mapped rows lie in the file's pages and keep their
            shard open. This saves the copy of rows that are read once. The file must not be truncated while they exist.
            Writes into them stay in this process, and later reads of this store see them.

    Raises:
        StoreError: the directory is not a store, is only a part of one, or is newer than this convtap.
        InvalidValue: ``copy=False`` is passed with ``mmap=False``.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool | None = None, copy: bool = True) -> None:
        self.path = Path(path)
        self._reader = StoreReader(self.path, mmap, copy)
        self._names = self._shown_names()
        self._rows: dict[str, LayerRows] = {}
        self._views: dict[str, LayerView] = {}
        if self._reader.index.bad:
            warn_user(unreadable(self._reader.index))

    def _shown_names(self) -> dict[str, str]:
        """Returns the key in the shards by the shown name.

        They differ if ``calls="keys"`` saw a single call.
        """
        keys = list(self._reader.index.layers)
        if self._reader.identity.get("calls") != "keys":
            return {key: key for key in keys}
        layers = set(self._reader.identity["layers"])
        stems = {key: stem(key, layers) for key in keys}
        times = Counter(stems.values())
        return {(found if times[found] == 1 else key): key for key, found in stems.items()}

    # -- contents

    @property
    def layers(self) -> list[str]:
        """The names of the layers with outputs, in execution order."""
        return list(self._names)

    @property
    def ids(self) -> list[Id]:
        """The id of every sample, in the order of the data set."""
        return self._reader.index.ids.tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._reader.index.ids)

    def __contains__(self, layer: object) -> bool:
        return layer in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, layer: str) -> LayerView:
        """Returns a view of a layer's outputs, which reads them when they are indexed.

        Raises:
            LayerNotFound: the store has no outputs of this layer.
            AmbiguousCall: the layer ran several times, and each call has its own key.
            InvalidType: ``layer`` is not a str.
        """
        view = self._views.get(layer) if isinstance(layer, str) else None
        if view is not None:
            return view
        if not isinstance(layer, str):
            raise InvalidType(
                f"store[{layer!r}] is not indexed by a layer name. Write store[{self._first()!r}][id] for one layer of a "
                "sample, or store.sample(id) for all its layers."
            )
        view = self._views[layer] = LayerView(self._reader, self._layer(layer))
        return view

    def _layer(self, name: str) -> LayerRows:
        found = self._rows.get(name)
        if found is None:
            if name not in self._names:
                raise self._missing(name)
            found = self._rows[name] = LayerRows(self._reader, name, self._names[name])
        return found

    def sample(self, id: Id) -> dict[str, Tensor]:
        """Returns one sample's outputs by layer, such as (C, T).

        Layers that did not run for the sample are missing.

        Raises:
            OutOfRange: the store has no sample with this id.
            StoreError: several samples have this id, or a shard cannot be read.
        """
        position = self.position(id)
        line = self._reader.index.starts.searchsorted(position, "right") - 1
        ran = dict(zip(self._reader.index.layers, self._reader.index.present[line].tolist(), strict=True))
        return {shown: self._layer(shown).at(position) for shown, key in self._names.items() if ran[key]}

    def position(self, id: Id) -> int:
        """Returns the position of an id in the order of the samples.

        Raises:
            OutOfRange: the store has no sample with this id.
            StoreError: several samples have this id.
        """
        return self._reader.position(id)

    # -- many samples

    def numpy(self, layer: str) -> Any:
        """Returns all of a layer's outputs as one NumPy array.

        The array is (N, C, T), or (N, T, C) if the layer's rows are (T, C); see ``time_dim`` of ``store[layer]``. bfloat16
        and float8 become float32, exactly.

        Raises:
            LayerNotFound: the store has no outputs of this layer.
            Unsupported: the shapes of its rows differ, or it did not run for every sample.
        """
        return self[layer].numpy()

    def dataset(
        self,
        layers: str | Sequence[str] | None = None,
        labels: Mapping[Any, Any] | Callable[[Any], Any] | None = None,
        time_dim: int | Mapping[str, int] | None = None,
    ) -> StoreDataset:
        """Returns a map-style data set for a ``DataLoader``.

        It yields ``(id, {layer: Tensor})``, or ``(id, {layer: Tensor}, label)``. Its ``collate`` pads ragged rows:
        ``DataLoader(data, batch_size=8, collate_fn=data.collate)``. The samples of a batch are read together.

        Args:
            layers: the layers; None for all.
            labels: a mapping from ids to labels, or a function of the id; None for the extracted labels, if any.
            time_dim: the axis of a row on which ``collate`` pads, counted from the end, for all layers or by layer. None
                for the axis in the store; see ``LayerView.time_dim``.

        Raises:
            LayerNotFound: the store has no outputs of one of the layers.
            InvalidType, InvalidValue: ``layers`` is empty, or ``labels`` is neither a mapping nor a function.
        """
        names = self.layers if layers is None else [layers] if isinstance(layers, str) else list(layers)
        return StoreDataset(self._reader, [self._layer(name) for name in names], labels, time_dim)

    # -- state

    def verify(self, progress: bool = False) -> Table:
        """Reads every shard and compares its checksums.

        Returns:
            A table with one row ``(shard, problem)`` for each bad shard. It is empty if all shards are whole.
        """
        return verify(self.path, progress)

    @property
    def missing(self) -> list[int] | None:
        """The numbers of the missing batches; None if the number of batches is unknown."""
        return missing(self.path, self._reader.identity, self._reader.index)

    @property
    def padding(self) -> dict[str, str]:
        """The layers whose frames depend on the padding of batches, with the cause.

        For example ``{"conv2": "same padding: the last 2 frames"}``. It is empty if no batch was padded, or if no frame
        depends on the padding.
        """
        return read_padding(self.path)

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table of the layers, with notes on missing and unreadable batches.

        Args:
            rows: the maximum number of layers to print, the first and the last; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        return summary(self.path, self._reader.identity, self._reader.index, self._names, rows)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def _first(self) -> str:
        return next(iter(self._names), "name")

    def _missing(self, layer: str) -> LayerNotFound | AmbiguousCall:
        layers = set(self._reader.identity["layers"])
        split = {name: split_key(name, layers) for name in self._names}
        parts = [
            name for name, (base, _, path) in split.items() if layer == base or f"{base}{path}".startswith(f"{layer}[")
        ]
        parts = parts or [name for name, (base, _, path) in split.items() if layer == base + path]
        if parts and any(split[name][1] is not None for name in parts):
            return AmbiguousCall(
                f"{layer!r} ran several times, and each call has its own key: {listed(parts)}. "
                f"Read one of them: store[{parts[-1]!r}]."
            )
        if parts:
            return LayerNotFound(
                f"{layer!r} returned a structure, and each tensor has its own key: {listed(parts)}. Read one of them: "
                f"store[{parts[0]!r}]."
            )
        if layer in self._reader.identity["layers"]:
            return LayerNotFound(
                f"{layer!r} was selected, but did not run for any sample (or, with at='activation', no activation followed "
                f"it). The store has: {listed(self._names)}."
            )
        near = did_you_mean(layer, list(self._names))
        return LayerNotFound(f"the store has no layer {layer!r}. It has: {listed(self._names)}.{near}")
