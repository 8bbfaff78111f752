"""Compares two statistics of one model, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from convtap._errors import InvalidValue, listed
from convtap._public import public
from convtap._result.layer_statistics import LayerStatistics, source_of
from convtap._result.statistics import Statistics
from convtap._spelling import printable_repr
from convtap._table import MOST, Rows, Table


@public
@printable_repr
@dataclass(frozen=True)
class LayerDrift:
    """The change of one layer's channels from one data set to the other.

    Each number is that of the channel that has changed most.

    Attributes:
        name: the layer.
        shift: the greatest |mean of b − mean of a| / standard deviation of a.
        shift_channel: the channel with this shift.
        scale: the ratio of standard deviations, b / a, that is furthest from 1.
        scale_channel: the channel with this ratio.
        distance: the greatest Kolmogorov-Smirnov distance, from 0 to 1. It is the maximum difference of the two cumulative
            distributions. None without quantiles.
        distance_channel: the channel with this distance.
        died: the channels that are dead in ``b`` only.
        revived: the channels that are dead in ``a`` only.
    """

    name: str
    shift: float
    shift_channel: int
    scale: float
    scale_channel: int
    distance: float | None
    distance_channel: int | None
    died: list[int]
    revived: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain Python values."""
        return asdict(self)


@public
class Drift(Sequence[LayerDrift]):
    """The result of ``compare`` for two statistics, in the order of ``a``.

    Print it, iterate over it, or read ``worst``.

    Attributes:
        only_a: the layers that ``b`` lacks.
        only_b: the layers that ``a`` lacks.
    """

    def __init__(self, rows: list[LayerDrift], only_a: list[str], only_b: list[str]) -> None:
        self._rows = rows
        self.only_a = only_a
        self.only_b = only_b

    @property
    def worst(self) -> LayerDrift:
        """The layer with the greatest distance, or shift if it has no quantiles."""
        return max(self._rows, key=lambda row: row.shift if row.distance is None else row.distance)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[LayerDrift]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line per layer.

        Args:
            rows: the maximum number of layers to print, the first and the last; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        columns = ("layer", "shift", "channel", "scale", "channel", "distance", "channel", "died", "revived")
        missing = (("a", self.only_a), ("b", self.only_b))
        notes = [f"only in {side}: {listed(names)}" for side, names in missing if names]
        found = Rows(self._rows, _cells)
        return Table(columns, found, "", notes, self._rows, most=rows, whole="print(drift.summary(rows=None))")

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def is_statistics(side: Any) -> TypeGuard[Statistics]:
    """Returns whether one side of a comparison is statistics."""
    return isinstance(side, Statistics)


def drift_of(a: Statistics, b: Statistics, asked: Sequence[str]) -> Drift:
    """Compares two statistics by channel.

    Args:
        a: the reference.
        b: the statistics to compare with it.
        asked: the names of options that do not apply to statistics.

    Raises:
        InvalidValue: an option was passed, the two have no layer in common, or a layer's number of channels differs.
    """
    if asked:
        raise InvalidValue(f"compare of statistics does not take {listed(asked)}. Write compare(stats_a, stats_b).")
    both = [name for name in a if name in b]
    if not both:
        raise InvalidValue(
            f"the two statistics have no layer in common: {listed(a)} and {listed(b)}. Collect both from the same model."
        )
    rows = [_drift(a[name], b[name]) for name in both]
    return Drift(rows, [name for name in a if name not in b], [name for name in b if name not in a])


def _drift(a: LayerStatistics, b: LayerStatistics) -> LayerDrift:
    if a.channels != b.channels:
        raise InvalidValue(
            f"{a.name!r} has {a.channels} channels in a and {b.channels} in b. Collect both with the same model and options."
        )
    shift, shift_channel = _furthest(_ratio((b.mean - a.mean).abs(), a.std, torch.inf))
    ratios = _ratio(b.std, a.std, torch.inf)
    ratios = torch.where((a.std == 0) & (b.std == 0), 1.0, ratios)
    _, scale_channel = _furthest(ratios.log().abs())
    distance: float | None = None
    distance_channel: int | None = None
    if a.relative_error is not None and a.relative_error == b.relative_error:
        distance, distance_channel = _furthest(source_of(a).to("cpu").distance(source_of(b).to("cpu")))
    dead = (set(a.dead), set(b.dead))
    scale = float(ratios.reshape(-1)[scale_channel])
    died, revived = sorted(dead[1] - dead[0]), sorted(dead[0] - dead[1])
    return LayerDrift(
        a.name, shift, shift_channel, scale, scale_channel, distance, distance_channel, died=died, revived=revived
    )


def _ratio(over: Tensor, under: Tensor, otherwise: float) -> Tensor:
    """Returns a quotient: 0 for 0 / 0, and ``otherwise`` for other divisions by zero."""
    zero = torch.where(over == 0, 0.0, otherwise)
    return torch.where(under == 0, zero, over / under)


def _furthest(values: Tensor) -> tuple[float, int]:
    """Returns the greatest value and its channel. Channels without values count least."""
    values = values.reshape(-1)
    channel = int(values.nan_to_num(nan=-1.0, posinf=torch.inf).argmax())
    return float(values[channel]), channel


def _cells(row: LayerDrift) -> list[Any]:
    numbers = [row.shift, row.shift_channel, row.scale, row.scale_channel, row.distance, row.distance_channel]
    return [row.name, *numbers, len(row.died), len(row.revived)]
