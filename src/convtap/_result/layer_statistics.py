"""The statistics of one layer's values, as tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, Unsupported, plural
from convtap._public import public
from convtap._spelling import printable
from convtap._tensors.channel_statistics import ChannelStatistics
from convtap._tensors.quantile_sketch import relative_error

#: A channel is saturated if at least this share of its values lies at its bounds.
_SATURATED = 0.5
#: Below this number of values, the minimum and the maximum alone are a large share.
_FEW = 8


@public
class LayerStatistics:
    """The statistics of one layer's values, by channel.

    They are tensors (C,), or scalars with ``per="layer"``, on the CPU. Counts are int64, and all others are float64. Only
    ``count``, ``nan`` and ``inf`` include NaN and Inf. For a channel without finite values, everything that is not a count is
    NaN.

    Attributes:
        name: the layer, with the path of the tensor if the layer returns several: ``lstm[1][0]``.
        calls: the number of tensors that were added.
    """

    def __init__(self, name: str, source: ChannelStatistics, *, by_channel: bool, calls: int = 0) -> None:
        self.name = name
        self.calls = calls
        self._source = source
        self._by_channel = by_channel

    @property
    def channels(self) -> int | None:
        """The number of channels; None if the statistics are of the whole layer."""
        return self._source.channels if self._by_channel else None

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the statistics take, for any number of values."""
        return self._source.nbytes

    @property
    def count(self) -> Tensor:
        """The number of values, including NaN and Inf."""
        return self._shown(torch.full((self._source.channels,), self._source.count, dtype=torch.int64))

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self._of_values(self._source.moments.mean)

    @property
    def var(self) -> Tensor:
        """The variance of the population: the mean squared distance from the mean."""
        moments = self._source.moments
        return self._of_values(moments.squares / moments.finite)

    @property
    def std(self) -> Tensor:
        """The standard deviation of the population."""
        return self.var.sqrt()

    @property
    def min(self) -> Tensor:
        """The smallest value."""
        return self._of_values(self._source.moments.low)

    @property
    def max(self) -> Tensor:
        """The largest value."""
        return self._of_values(self._source.moments.high)

    @property
    def zeros(self) -> Tensor:
        """The number of values that are exactly zero."""
        return self._shown(self._source.moments.zeros.long())

    @property
    def nan(self) -> Tensor:
        """The number of values that are NaN."""
        return self._shown(self._source.moments.nan.long())

    @property
    def inf(self) -> Tensor:
        """The number of values that are Inf or -Inf."""
        return self._shown(self._source.moments.inf.long())

    @property
    def relative_error(self) -> float | None:
        """The largest relative error of ``quantile``; None with ``quantiles=None``."""
        sketch = self._source.sketch
        return None if sketch is None else relative_error(sketch.digits)

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Returns quantiles, with an error of at most ``relative_error``.

        A quantile is the value at rank floor(q · (n − 1)) of the n finite values in order, as ``numpy.quantile`` returns it
        with ``method="lower"``. 0 and 1 return the exact minimum and maximum. Values below 2⁻³¹ of the largest
        magnitude in their channel count as zero, and so do values below 1.2e-38.

        Args:
            q: a number from 0 to 1, or several numbers, which become the first axis of the result.

        Raises:
            InvalidType, InvalidValue: ``q`` is not a number from 0 to 1.
            Unsupported: the statistics were collected with ``quantiles=None``.
        """
        if self._source.sketch is None:
            raise Unsupported(
                f"the quantiles of {self.name!r} were not computed. Remove quantiles=None, or write quantiles=0.01."
            )
        if isinstance(q, (int, float)):
            return self._of_values(self._source.quantile(_checked(q)))
        if not isinstance(q, (Sequence, Tensor)) or isinstance(q, (str, bytes)):
            raise InvalidType(f"q is a {type(q).__name__}. Pass a number from 0 to 1, or a list of them.")
        values = q.tolist() if isinstance(q, Tensor) else list(q)
        if not values:
            raise InvalidValue("q is empty. Pass a number from 0 to 1, or a list of them.")
        return torch.stack([self._of_values(self._source.quantile(_checked(one))) for one in values])

    @property
    def dead(self) -> list[int]:
        """The numbers of the channels whose value never changed.

        A channel with a single value is dead if that is zero. A channel with NaN or Inf is not dead. With ``per="layer"``,
        the whole layer is channel 0.
        """
        moments = self._source.moments
        same = (moments.low == moments.high) & (moments.nan + moments.inf == 0)
        if self._source.count == 1:
            same = same & (moments.low == 0)
        return _numbers(same)

    @property
    def saturation(self) -> Tensor:
        """The share of finite values at the channel's minimum or maximum, from 0 to 1.

        A minimum or maximum of zero does not count. The share is large if a channel is clipped, or if an activation holds it
        at its limit.
        """
        moments = self._source.moments
        at = torch.where(moments.low != 0, moments.at_low, 0)
        at = at + torch.where((moments.high != 0) & (moments.high != moments.low), moments.at_high, 0)
        return self._of_values(at / moments.finite)

    @property
    def saturated(self) -> list[int]:
        """The numbers of the channels with ``saturation`` of at least one half.

        Dead channels and channels with fewer than 8 finite values are not saturated.
        """
        dead = set(self.dead)
        few = self._source.moments.finite < _FEW
        found = (self.saturation.reshape(-1) >= _SATURATED) & ~few.cpu()
        return [channel for channel in _numbers(found) if channel not in dead]

    @property
    def whole(self) -> LayerStatistics:
        """The statistics over all channels, as scalars."""
        return LayerStatistics(self.name, self._source.whole(), by_channel=False, calls=self.calls)

    def __repr__(self) -> str:
        channels = "" if self.channels is None else f"{self.channels} channels, "
        return printable(
            f"<LayerStatistics {self.name}: {channels}{int(self.count.sum()):,} values in {plural(self.calls, 'call')}>"
        )

    def _of_values(self, found: Tensor) -> Tensor:
        return self._shown(torch.where(self._source.moments.finite > 0, found, torch.nan))

    def _shown(self, found: Tensor) -> Tensor:
        found = found.detach().to("cpu", copy=True)
        return found if self._by_channel else found[0]


def source_of(layer: LayerStatistics) -> ChannelStatistics:
    """Returns the state behind a layer's statistics."""
    return layer._source


def is_by_channel(layer: LayerStatistics) -> bool:
    """Returns whether each channel of a layer has its own statistics."""
    return layer._by_channel


def _numbers(which: Tensor) -> list[int]:
    return [int(number) for number in which.nonzero()[:, 0]]


def _checked(q: float) -> float:
    if isinstance(q, bool) or not isinstance(q, (int, float)):
        raise InvalidType(f"q holds {q!r}. Pass a number from 0 to 1, or a list of them.")
    if not 0 <= q <= 1:
        raise InvalidValue(f"q={q} is out of range. Pass a number from 0 to 1: quantile(0.999).")
    return float(q)
