"""Computes running moments and counts of each channel in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Note: [Running statistics]
# Assumption: the mean and the variance follow from the sum and the sum of squares of all values.
# Failure: the sums cancel. For values near 1e6 that differ by 1e-3, float64 keeps no digit of the variance.
# Choice: each piece is read twice, once for its mean and once for the squared distances from the mean. Chan's update joins
#   pieces (Chan, Golub and LeVeque, 1983). All values are relative to the mean of the first piece, so the rounding error of
#   the running mean after 10⁶ updates is relative to the spread, not to the mean. Counts are also float64, exact up to 2⁵³,
#   so a state is one tensor and an update takes few operations.

#: The rows of a state. Without a value, ``low`` and ``negated_high`` are Inf. ``at_low`` and ``at_high`` count the values
#: that equal the bounds.
_FINITE, _SHIFT, _MEAN, _SQUARES, _ZEROS, _NAN, _INF, _LOW, _NEGATED_HIGH, _AT_LOW, _AT_HIGH = range(11)
_COUNTS, _BOUNDS, _AT = slice(_ZEROS, _INF + 1), slice(_LOW, _NEGATED_HIGH + 1), slice(_AT_LOW, _AT_HIGH + 1)


class Moments:
    """The moments of each channel's values so far. See Note: [Running statistics].

    Attributes:
        state: (11, C) in float64.
    """

    def __init__(self, state: Tensor) -> None:
        self.state = state

    @classmethod
    def new(cls, channels: int, device: torch.device) -> Moments:
        """Returns moments without values."""
        state = torch.zeros((11, channels), dtype=torch.float64, device=device)
        state[_BOUNDS] = math.inf
        return cls(state)

    def to(self, device: torch.device | str) -> Moments:
        """Returns a copy on a device."""
        return Moments(self.state.to(device, copy=True))

    @property
    def finite(self) -> Tensor:
        """The number of finite values."""
        return self.state[_FINITE]

    @property
    def mean(self) -> Tensor:
        """The mean of the finite values."""
        return self.state[_SHIFT] + self.state[_MEAN]

    @property
    def squares(self) -> Tensor:
        """The sum of the squared distances of the finite values from their mean."""
        return self.state[_SQUARES]

    @property
    def low(self) -> Tensor:
        """The least finite value, or Inf without one."""
        return self.state[_LOW]

    @property
    def high(self) -> Tensor:
        """The greatest finite value, or -Inf without one."""
        return -self.state[_NEGATED_HIGH]

    @property
    def zeros(self) -> Tensor:
        """The number of values that are zero."""
        return self.state[_ZEROS]

    @property
    def nan(self) -> Tensor:
        """The number of values that are NaN."""
        return self.state[_NAN]

    @property
    def inf(self) -> Tensor:
        """The number of values that are Inf or -Inf."""
        return self.state[_INF]

    @property
    def at_low(self) -> Tensor:
        """The number of values that equal the least one."""
        return self.state[_AT_LOW]

    @property
    def at_high(self) -> Tensor:
        """The number of values that equal the greatest one."""
        return self.state[_AT_HIGH]

    def begin(self, values: Tensor, channels: slice, *, waits: bool) -> None:
        """Sets the shift of some channels to the mean of their first values, (A, C, D)."""
        total = values.sum((0, 2), dtype=torch.float64)
        count: Tensor | int = values.shape[0] * values.shape[2]
        if not (waits and math.isfinite(total.sum().item())):
            finite = values.isfinite()
            total = values.masked_fill(~finite, 0).sum((0, 2), dtype=torch.float64)
            count = finite.sum((0, 2)).clamp_(min=1)
        self.state[_SHIFT, channels] = total / count

    def beside(self) -> Moments:
        """Returns moments without values, relative to the same shift."""
        found = Moments(torch.zeros_like(self.state))
        found.state[_SHIFT] = self.state[_SHIFT]
        return found

    def measure(self, values: Tensor, channels: slice, *, waits: bool) -> Tensor | None:
        """Sets some channels to the moments of values, (A, C, D).

        Args:
            values: the values, of a floating type.
            channels: the channels of the values.
            waits: whether the host may wait for a result, which is free on the CPU but not on an accelerator.

        Returns:
            A mask of the finite values, or None if all are finite.
        """
        row = self.state[:, channels].unbind()
        count = values.shape[0] * values.shape[2]
        distance = values - row[_SHIFT][:, None]  # in float64
        total = distance.sum((0, 2))
        if waits and math.isfinite(total.sum().item()):
            row[_FINITE].fill_(count)
            total.div_(count)
            distance.sub_(total[:, None])
            _bounds(row, values, values, values)
            finite = None
        else:
            finite = values.isfinite()
            bad = ~finite
            total = distance.masked_fill_(bad, 0).sum((0, 2))
            torch.sum(finite, (0, 2), dtype=torch.float64, out=row[_FINITE])
            torch.sum(values.isnan(), (0, 2), dtype=torch.float64, out=row[_NAN])
            row[_INF].copy_(count - row[_NAN] - row[_FINITE])
            total.div_(row[_FINITE].clamp(min=1))
            distance.sub_(total[:, None]).masked_fill_(bad, 0)
            infinite = (values.masked_fill(bad, sign * math.inf) for sign in (1, -1))
            _bounds(row, values.masked_fill(bad, math.nan), *infinite)
        row[_MEAN].copy_(total)
        torch.sum(distance.mul_(distance), (0, 2), out=row[_SQUARES])
        return finite

    def merge(self, other: Moments) -> None:
        """Adds the moments of another object with as many channels on the same device."""
        mine, theirs = self.state, other.state
        fresh = (mine[_FINITE] == 0) & (theirs[_FINITE] > 0)
        mine[_SHIFT] = torch.where(fresh, theirs[_SHIFT], mine[_SHIFT])
        self.join(other, theirs[_MEAN] + (theirs[_SHIFT] - mine[_SHIFT]))

    def join(self, other: Moments, mean: Tensor | None = None) -> None:
        """Joins two sets of moments in place by Chan's update.

        Args:
            other: the moments to add.
            mean: the mean of ``other`` relative to this object's shift, or None if the shifts are equal.
        """
        mine, theirs = self.state, other.state
        mean = theirs[_MEAN] if mean is None else mean
        total = mine[_FINITE] + theirs[_FINITE]
        weight = theirs[_FINITE] / total.clamp(min=1)
        apart = mean - mine[_MEAN]
        step = apart * weight
        mine[_SQUARES].add_(apart.mul_(step).mul_(mine[_FINITE])).add_(theirs[_SQUARES])
        mine[_MEAN].add_(step)
        mine[_FINITE].copy_(total)
        mine[_COUNTS].add_(theirs[_COUNTS])
        best = torch.minimum(mine[_BOUNDS], theirs[_BOUNDS])
        mine[_AT].mul_(mine[_BOUNDS] == best).add_((theirs[_BOUNDS] == best) * theirs[_AT])
        mine[_BOUNDS].copy_(best)

    def whole(self) -> Moments:
        """Returns the moments of all channels together, as one channel."""
        finite, some = self.finite, self.finite > 0
        total = finite.sum().clamp(min=1)
        shift = (torch.where(some, self.mean, 0) * finite).sum() / total
        apart = torch.where(some, self.state[_MEAN] + (self.state[_SHIFT] - shift), 0)
        mean = (apart * finite).sum() / total
        found = Moments(self.state.sum(1, keepdim=True))
        found.state[_SHIFT], found.state[_MEAN] = shift, mean
        found.state[_SQUARES] = (self.squares + finite * (apart - mean).square()).sum()
        best = self.state[_BOUNDS].amin(1, keepdim=True)
        found.state[_BOUNDS] = best
        found.state[_AT] = (self.state[_AT] * (self.state[_BOUNDS] == best)).sum(1, keepdim=True)
        return found


def _bounds(row: tuple[Tensor, ...], values: Tensor, for_low: Tensor, for_high: Tensor) -> None:
    """Sets the bounds of some values, and counts the values at the bounds and at zero."""
    low, high = for_low.amin((0, 2)), for_high.amax((0, 2))
    row[_LOW].copy_(low)
    torch.neg(high.double(), out=row[_NEGATED_HIGH])
    same = torch.empty(values.shape, dtype=torch.float32, device=values.device)  # floats sum faster than booleans
    for field, value in ((_ZEROS, 0), (_AT_LOW, low[:, None]), (_AT_HIGH, high[:, None])):
        torch.eq(values, value, out=same)
        torch.sum(same, (0, 2), dtype=torch.float64, out=row[field])
