"""The statistics of many layers, as a mapping from layer names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convtap._errors import InvalidType, InvalidValue, LayerNotFound, did_you_mean, listed, plural
from convtap._public import public
from convtap._result.accumulate import Accumulator, row_options
from convtap._result.call import Call
from convtap._result.layer_statistics import LayerStatistics, is_by_channel, source_of
from convtap._result.statistics_file import read, write
from convtap._table import MOST, Rows, Table, human_bytes
from convtap._tensors.channel_statistics import ChannelStatistics

_COLUMNS = ("layer", "values", "mean", "std", "min", "1%", "50%", "99%", "max", "zeros", "nan", "inf")
_OF_CHANNELS = ("channels", "dead", "saturated")


@public
class Statistics(Mapping[str, LayerStatistics]):
    """The statistics of each layer, by name, in execution order.

    They can be read at any time, even while the model runs.
    """

    def __init__(self, layers: dict[str, LayerStatistics] | None = None) -> None:
        self._layers = {} if layers is None else layers

    def __getitem__(self, name: str) -> LayerStatistics:
        """Returns the statistics of a layer.

        Raises:
            LayerNotFound: the layer has no statistics.
        """
        found = self._layers.get(name)
        if found is None:
            names = list(self._layers)
            near = did_you_mean(name, names) if isinstance(name, str) else ""
            raise LayerNotFound(f"{name!r} has no statistics. Layers with statistics: {listed(names)}.{near}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._layers))

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the statistics take, for any number of values."""
        return sum(layer.nbytes for layer in self._layers.values())

    def clear(self) -> None:
        """Removes all statistics."""
        self._layers.clear()

    def merge(self, other: Statistics) -> Statistics:
        """Returns the merged statistics of two parts, such as parts of a data set.

        Raises:
            InvalidType: ``other`` is not a ``Statistics``.
            InvalidValue: a layer has different channels or quantiles in ``other``.
        """
        if not isinstance(other, Statistics):
            raise InvalidType(
                f"other is a {type(other).__name__}, which is not a Statistics. Write for example a.merge(b)."
            )
        return Statistics(merged([dict(self), dict(other)]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to one safetensors file; see ``Statistics.load``.

        Raises:
            StoreError: the file cannot be written.
        """
        write(self._layers, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Loads the statistics that ``save`` wrote.

        Raises:
            StoreError: the file does not exist, or ``save`` did not write it.
        """
        return cls(read(path))

    def plot(self, layers: Any = None) -> Any:
        """Draws the distribution of each layer, and its dead and saturated channels.

        ``convtap.plot.statistics`` describes the figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        return importlib.import_module("convtap.plot").statistics(self, layers)

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line per layer, over all of its channels.

        Args:
            rows: the maximum number of layers to print, the first and the last; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        layers = list(self._layers.values())
        title = "" if layers else "no statistics collected"
        whole = "print(stats.summary(rows=None))"
        has_channels = any(is_by_channel(layer) for layer in layers)
        columns = (*_COLUMNS, *_OF_CHANNELS) if has_channels else _COLUMNS
        found = Rows(layers, lambda layer: _row(layer)[: len(columns)])
        return Table(columns, found, title, self._notes(), layers, most=rows, whole=whole)

    def _notes(self) -> list[str]:
        errors = {layer.relative_error for layer in self._layers.values()}
        error = next(iter(errors)) if len(errors) == 1 else None
        shown = f", quantiles within {100 * error:.2g} %" if error is not None else ""
        return [f"{plural(len(self), 'layer')}, {human_bytes(self.nbytes)}{shown}"] if self._layers else []

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def _row(layer: LayerStatistics) -> list[Any]:
    whole = layer.whole
    count = int(whole.count)
    has_values = count > int(whole.nan) + int(whole.inf)

    def number(value: Any) -> float | None:
        return float(value) if has_values else None

    quantiles = [None] * 3 if layer.relative_error is None else [number(q) for q in whole.quantile((0.01, 0.5, 0.99))]
    return [
        layer.name,
        count,
        number(whole.mean),
        number(whole.std),
        number(whole.min),
        *quantiles,
        number(whole.max),
        f"{100 * int(whole.zeros) / count:.1f}%" if count else None,
        int(whole.nan),
        int(whole.inf),
        layer.channels,
        None if layer.channels is None else len(layer.dead),
        None if layer.channels is None else len(layer.saturated),
    ]


def merged(parts: list[dict[str, LayerStatistics]]) -> dict[str, LayerStatistics]:
    """Returns the statistics of several parts, merged into new ones.

    Raises:
        InvalidValue: a layer has different channels or quantiles in two parts.
    """
    found: dict[str, LayerStatistics] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found[name] = merged_layer([part[name] for part in parts if name in part])
    return found


def merged_layer(parts: list[LayerStatistics]) -> LayerStatistics:
    """Returns the statistics of one layer in several parts, merged on the CPU."""
    first = parts[0]
    total: ChannelStatistics = source_of(first).to("cpu")
    calls = first.calls
    for part in parts[1:]:
        for what, mine, theirs in (
            ("numbers of channels", first.channels, part.channels),
            ("relative errors of quantiles", first.relative_error, part.relative_error),
        ):
            if mine != theirs:
                raise InvalidValue(
                    f"{first.name!r} has two {what}, {mine} and {theirs}. Compute both with the same model and options."
                )
        total.merge(source_of(part))
        calls += part.calls
    return LayerStatistics(first.name, total, by_channel=is_by_channel(first), calls=calls)


def statistics_of(calls: Iterable[Call], per: str, runs: str, quantiles: float | None) -> Statistics:
    """Returns the statistics of kept calls, with options as in ``convtap.statistics``.

    Raises:
        InvalidValue: an option is invalid.
        Unsupported: an output has no ordinary values, or its number of channels changes between calls.
    """
    layers: dict[str, LayerStatistics] = {}
    accumulator = Accumulator(layers, **row_options(per, runs, quantiles))
    for call in list(calls):
        accumulator.add(call)
    return Statistics(layers)
