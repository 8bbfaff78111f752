"""Estimates quantiles from logarithmic histograms, with a known relative error."""

from __future__ import annotations

import torch
from torch import Tensor

# Note: [Quantile sketch]
# Assumption: a histogram is enough for the quantiles of 10⁹ values. If the width of each bin is a fixed fraction of its
#   values, the relative error of each quantile is within that fraction (Masson, Rim and Lee: DDSketch, 2019).
# Failure: the range of the values is unknown beforehand, and 2¹⁵ bins per channel for all of float32 are too many. The
#   logarithm of each value is slow.
# Choice: the bin of a value is given by the leading bits of its float32 form: the exponent and the first ``digits`` bits of
#   the fraction. A channel has bins for the 32 octaves up to its greatest magnitude so far. If the magnitude reaches another
#   octave, the lowest bins are joined. Values below 2⁻³¹ of the greatest magnitude count as zero. All work is done on the
#   device, and the host does not wait for a value.

_OCTAVES = 32
_FRACTION = 23  # bits of the fraction in float32
_BIAS = 127
_SIGN = 31
_MAGNITUDE = 0x7FFFFFFF
_LARGEST = torch.finfo(torch.float32).max
_MOST = 2**31 - 1


def digits_for(error: float) -> int:
    """Returns the number of fraction bits for a relative error of at most ``error``."""
    return next((digits for digits in range(1, 12) if relative_error(digits) <= error), 12)


def relative_error(digits: int) -> float:
    """Returns the greatest relative error of a quantile.

    It is half a bin at the low end of an octave.
    """
    return 1.0 / ((2 << digits) + 1)


class Sketch:
    """A histogram of each channel's positive and negative magnitudes.

    See Note: [Quantile sketch].

    Args:
        channels: the number of channels.
        digits: the number of fraction bits that distinguish bins.
        device: the device of the histogram.

    Attributes:
        bins: the number of bins per sign. Bin 0 also holds all smaller magnitudes.
        base: (C,) the number of the float32 bin that is bin 0.
        counts: (C, 2, bins), positive values first.
    """

    def __init__(self, channels: int, digits: int, device: torch.device) -> None:
        self.digits = digits
        self.bins = _OCTAVES << digits
        self.base = torch.full((channels,), self._lowest, dtype=torch.int32, device=device)
        self.counts = torch.zeros((channels, 2, self.bins), dtype=torch.int32, device=device)

    def to(self, device: torch.device | str) -> Sketch:
        """Returns a copy on a device."""
        return self.made(self.digits, self.base.to(device, copy=True), self.counts.to(device, copy=True))

    @property
    def _lowest(self) -> int:
        """The base of a channel without values: one less than for subnormal numbers."""
        return -self.bins

    @classmethod
    def made(cls, digits: int, base: Tensor, counts: Tensor) -> Sketch:
        """Returns a sketch of these tensors."""
        found = object.__new__(cls)
        found.digits, found.bins, found.base, found.counts = digits, counts.shape[2], base, counts
        return found

    def expect(self, count: int) -> None:
        """Widens the counts if ``count`` values per channel could overflow 32 bits."""
        if count > _MOST and self.counts.dtype is torch.int32:
            self.counts = self.counts.long()

    def add(self, values: Tensor, finite: Tensor | None, channels: slice, *, waits: bool) -> None:
        """Adds values of some channels, (A, C, D).

        Values that are not finite count as zero.

        Args:
            values: the values, of a floating type.
            finite: a mask of the finite values, or None if all are finite.
            channels: the channels of the values.
            waits: whether the host may wait for a result.
        """
        if values.dtype is torch.float64:
            values = values.clamp(-_LARGEST, _LARGEST)
        values = values.float()
        if finite is not None:
            values = values.masked_fill(~finite, 0)
        bits = values.contiguous().view(torch.int32)
        places = (bits & _MAGNITUDE).bitwise_right_shift_(_FRACTION - self.digits)
        self._make_room(places.amax((0, 2)), channels, waits=waits)
        places.sub_(self.base[channels, None]).clamp_(min=0)
        places.add_((bits >> _SIGN).bitwise_and_(self.bins))
        counts = self.counts[channels].view(-1)
        if counts.numel() > _MOST:  # 32-bit indices would overflow
            places = places.long()
        rows = torch.arange(places.shape[1], dtype=places.dtype, device=places.device).mul_(2 * self.bins)
        ones = torch.ones((), dtype=counts.dtype, device=counts.device).expand(places.numel())
        counts.index_add_(0, places.add_(rows[:, None]).view(-1), ones)

    def merge(self, other: Sketch) -> None:
        """Adds the counts of another sketch.

        Both have the same bins, as many channels, and the same device.
        """
        if other.counts.dtype is torch.int64:
            self.counts = self.counts.long()
        base = torch.maximum(self.base, other.base)
        self._raise(self._all(), base)
        other = other.to(other.counts.device)
        other._raise(other._all(), base)
        self.counts.add_(other.counts)

    def whole(self) -> Sketch:
        """Returns the sketch of all channels together, as one channel."""
        found = self.to(self.counts.device)
        found._raise(found._all(), self.base.amax().expand_as(self.base))
        counts = found.counts.sum(0, keepdim=True)
        return self.made(self.digits, found.base[:1], counts)

    def _make_room(self, highest: Tensor, channels: slice, *, waits: bool) -> None:
        """Extends the bins of some channels to the octave of the highest number."""
        needed = (highest | ((1 << self.digits) - 1)).sub_(self.bins - 1)
        base = self.base[channels]
        if not waits:
            self._raise(self._all()[channels], torch.maximum(needed, base))
            return
        rises = needed > base
        if not bool(rises.any()):
            return
        if bool((base == self._lowest).all()):  # the channels have no counts to move yet
            base.copy_(torch.maximum(needed, base))
            return
        which = rises.nonzero()[:, 0]
        self._raise(which + (channels.start or 0), needed[which])

    def _raise(self, channels: Tensor, base: Tensor) -> None:
        """Moves the bins of some channels to a greater base.

        The counts below the new base are joined in bin 0.
        """
        counts = self.counts[channels]
        up = (base - self.base[channels]).clamp_(0, self.bins)[:, None, None]
        bins = torch.arange(self.bins, device=counts.device)
        source = bins + up
        moved = counts.gather(2, source.clamp(max=self.bins - 1).expand_as(counts)).mul_(source < self.bins)
        moved[:, :, 0] = (counts * (bins <= up)).sum(2)
        self.counts[channels] = moved
        self.base[channels] = base

    def _all(self) -> Tensor:
        return torch.arange(len(self.base), device=self.base.device)

    def quantile(self, q: float, low: Tensor, high: Tensor, bad: Tensor) -> Tensor:
        """Returns the value at rank floor(q · (n − 1)) of each channel's n finite values.

        The result is NaN for a channel without finite values.

        Args:
            q: a number from 0 to 1.
            low: (C,) the least value of each channel.
            high: (C,) the greatest value of each channel.
            bad: (C,) the number of values that are not finite and were counted as zero.
        """
        ordered = self._cumulative(bad)
        total = ordered[:, -1]
        rank = (q * (total - 1).double()).floor().long().clamp_(min=0)
        place = torch.searchsorted(ordered, rank[:, None], right=True)[:, 0].clamp_(max=2 * self.bins - 2)
        place -= self.bins - 1
        found = place.sign() * self._value(place.abs() + self.base)
        found = torch.where(place == 0, 0.0, found).clamp(low, high)
        found = torch.where(rank == 0, low, torch.where(rank == total - 1, high, found))
        return torch.where(total > 0, found, float("nan"))

    def distance(self, other: Sketch, bad: Tensor, other_bad: Tensor) -> Tensor:
        """Returns the Kolmogorov-Smirnov distance of each channel from another sketch.

        It is the greatest difference between the two cumulative distributions, up to the width of a bin. It is NaN if one side
        has no values.

        Args:
            other: a sketch with the same bins, as many channels, and the same device.
            bad: as in ``quantile``.
            other_bad: ``bad`` for ``other``.
        """
        base = torch.maximum(self.base, other.base)
        shares = []
        for sketch, wrong in ((self, bad), (other, other_bad)):
            raised = sketch.to(base.device)
            raised._raise(raised._all(), base)
            ordered = raised._cumulative(wrong).double()
            shares.append(ordered / ordered[:, -1:])
        return (shares[0] - shares[1]).abs().amax(1)

    def _cumulative(self, bad: Tensor) -> Tensor:
        """Returns the number of values up to each bin, from the most negative bin on."""
        counts = self.counts.long()
        middle = counts[:, :, 0].sum(1) - bad.long()
        return torch.cat([counts[:, 1, 1:].flip(1), middle[:, None], counts[:, 0, 1:]], 1).cumsum(1)

    def _value(self, number: Tensor) -> Tensor:
        """Returns the value of a bin with the same relative distance to both ends."""
        lower, upper = self._edge(number), self._edge(number + 1)
        return 2 * lower * upper / (lower + upper)

    def _edge(self, number: Tensor) -> Tensor:
        fraction = (number & ((1 << self.digits) - 1)).double() / (1 << self.digits)
        return torch.ldexp(1 + fraction, (number >> self.digits).double() - _BIAS)
