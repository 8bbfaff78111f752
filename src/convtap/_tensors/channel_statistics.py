"""Computes moments, counts and quantiles of each channel over many tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convtap._tensors.quantile_sketch import Sketch
from convtap._tensors.running import Moments

#: The most values per piece: on the CPU as many as its cache holds, on other devices as memory allows.
_PIECE, _LARGE_PIECE = 1 << 17, 1 << 24


class ChannelStatistics:
    """Running statistics of each channel, in constant memory.

    Args:
        channels: the number of channels.
        digits: the precision of the quantiles, as in ``Sketch``, or None for no quantiles.
        device: the device of the values. A device without float64 is replaced by the CPU.

    Attributes:
        count: the number of values of each channel.
        moments: the moments and counts of the values.
        sketch: the histogram of the values, or None.
    """

    def __init__(self, channels: int, digits: int | None, device: torch.device | str = "cpu") -> None:
        device = _with_float64(torch.device(device))
        self.count = 0
        self.moments = Moments.new(channels, device)
        self.sketch = None if digits is None else Sketch(channels, digits, device)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return int(self.moments.finite.shape[0])

    @property
    def device(self) -> torch.device:
        """The device of the state."""
        return self.moments.finite.device

    @property
    def nbytes(self) -> int:
        """The size of the state in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> ChannelStatistics:
        """Returns a copy on a device."""
        found = object.__new__(ChannelStatistics)
        found.count, found.moments = self.count, self.moments.to(device)
        found.sketch = None if self.sketch is None else self.sketch.to(device)
        return found

    def add(self, values: Tensor, axis: int | None) -> None:
        """Adds all values of a tensor.

        Args:
            values: the values, of a floating type.
            axis: the channel axis, or None if all values belong to one channel.
        """
        if not values.numel():
            return
        pieces = _by_channel(values, axis).to(self.device)
        waits = _waits(self.device)
        self.count += pieces.shape[0] * pieces.shape[2]
        if self.sketch is not None:
            self.sketch.expect(self.count)
        begins = self.count == pieces.shape[0] * pieces.shape[2]
        most = _PIECE if waits else _LARGE_PIECE
        for rows, frames in _rows(pieces.shape, most):
            new = None if begins else self.moments.beside()
            for channels in _channels(pieces.shape, most):
                piece = pieces[rows, channels, frames]
                if begins:
                    self.moments.begin(piece, channels, waits=waits)
                target = self.moments if new is None else new
                finite = target.measure(piece, channels, waits=waits)
                if self.sketch is not None:
                    self.sketch.add(piece, finite, channels, waits=waits)
            if new is not None:
                self.moments.join(new)
            begins = False

    def merge(self, other: ChannelStatistics) -> None:
        """Adds the statistics of another object with as many channels."""
        other = other.to(self.device)
        self.count += other.count
        self.moments.merge(other.moments)
        if self.sketch is not None and other.sketch is not None:
            self.sketch.expect(self.count)
            self.sketch.merge(other.sketch)

    def whole(self) -> ChannelStatistics:
        """Returns the statistics of all channels together, as one channel."""
        found = object.__new__(ChannelStatistics)
        found.count, found.moments = self.count * self.channels, self.moments.whole()
        found.sketch = None
        if self.sketch is not None:
            wide = self.sketch.to(self.device)
            wide.expect(found.count)
            found.sketch = wide.whole()
        return found

    def quantile(self, q: float) -> Tensor:
        """Returns a quantile of each channel, (C,)."""
        assert self.sketch is not None
        moments = self.moments
        return self.sketch.quantile(q, moments.low, moments.high, moments.nan + moments.inf)

    def distance(self, other: ChannelStatistics) -> Tensor:
        """Returns the distance of each channel's distribution from another one's.

        See ``Sketch.distance``.
        """
        assert self.sketch is not None
        assert other.sketch is not None
        bad = [one.moments.nan + one.moments.inf for one in (self, other)]
        return self.sketch.distance(other.sketch, *bad)

    # -- as tensors

    def tensors(self) -> dict[str, Tensor]:
        """Returns the state as named tensors."""
        found = {"moments": self.moments.state}
        if self.sketch is not None:
            found.update(base=self.sketch.base, bins=self.sketch.counts)
        return found

    @classmethod
    def of_tensors(cls, count: int, digits: int | None, tensors: dict[str, Tensor]) -> ChannelStatistics:
        """Returns the statistics for a state from ``tensors()``.

        Raises:
            KeyError, ValueError: if ``tensors`` is not such a state.
        """
        found = cls(tensors["moments"].shape[1], digits)
        for name, own in found.tensors().items():
            if tensors[name].shape != own.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
        found.count, found.moments = count, Moments(tensors["moments"])
        if digits is not None:
            found.sketch = Sketch.made(digits, tensors["base"], tensors["bins"])
        return found


def _with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _waits(device: torch.device) -> bool:
    """Returns whether the host can read a result without waiting, as on the CPU."""
    return device.type == "cpu"


def _by_channel(values: Tensor, axis: int | None) -> Tensor:
    """Returns all values as (A, C, D), without a copy if the tensor is contiguous."""
    if axis is None:
        return values.reshape(1, 1, -1)
    axis %= values.dim()
    before, channels = _product(values.shape[:axis]), values.shape[axis]
    return values.reshape(before, channels, _product(values.shape[axis + 1 :]))


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _rows(shape: Sequence[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Yields slices of A and D of (A, C, D) that are contiguous in memory."""
    rows, channels, frames = shape
    step = max(1, most // (channels * frames))
    for row in range(0, rows, step):
        for frame in range(0, frames, most):
            yield slice(row, row + step), slice(frame, frame + most)


def _channels(shape: Sequence[int], most: int) -> Iterator[slice]:
    """Yields slices of C of (A, C, D).

    Each piece has at most ``most`` values, or one channel.
    """
    _, channels, frames = shape
    step = max(1, min(channels, most // frames))
    for channel in range(0, channels, step):
        yield slice(channel, channel + step)
