"""Looks at one tensor for NaN and Inf: its extremes and where they lie, as tensors on its own device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convtap._torch.transforms import unwrapped

# Note: [One pass over a tensor]
# Assumption: ``aminmax`` gives NaN for both ends where any element is NaN, in one pass and without a temporary; and
#   ``argmax`` and ``argmin`` give the place of a NaN before any other.
# Failure: ``isfinite().all()`` writes a mask first (ten times slower on the CPU), and a sum overflows on finite values.
# Choice: the two extremes say whether there is a NaN or an Inf, and are the range to show. On the CPU they are read at
#   once. On another device reading would wait for it, so the extremes and their places stay there until the block reads
#   all of them together.

#: The kinds of devices whose numbers can be read at once; on any other, reading waits for all work in flight.
READ_AT_ONCE = {"cpu"}

_outside_modes = torch._C.DisableTorchFunction


class FiniteRange(NamedTuple):
    """The least and the greatest finite value of a tensor (NaN if it has none), and how many elements are NaN and Inf."""

    low: float
    high: float
    nan: int = 0
    inf: int = 0


class Probe:
    """The extremes of one tensor.

    Attributes:
        path: where the tensor is in a structure; ``""`` if it is no part of one.
        shape: its shape.
        dtype: its type.
        device: its device.
        extremes: its least and its greatest value, as tensors (``here``: as numbers).
        places: on another device than the CPU, the flat positions of the greatest and of the least value.
        here: whether the extremes are numbers already.
        finite: the extremes of the finite values and the counts of NaN and Inf; None if they are not known: of a tensor on
            another device than the CPU that holds any.
        count: how many elements are NaN or Inf, where that was counted.
    """

    __slots__ = ("count", "device", "dtype", "extremes", "finite", "here", "path", "places", "shape")

    def __init__(self, tensor: Tensor, values: Tensor, path: str = "") -> None:
        self.path = path
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.here = values.device.type in READ_AT_ONCE
        self.count: int | None = None
        self.places: Any = None
        low, high = torch.aminmax(values)
        self.extremes: Any = (low.item(), high.item()) if self.here else (low, high)
        self.finite: FiniteRange | None = None
        if not self.here:
            self.places = (values.argmax(), values.argmin())
        elif not all(map(math.isfinite, self.extremes)):
            self.finite = finite_range(tensor)

    def range(self) -> FiniteRange | None:
        """The extremes of the finite values and the counts of the others, once ``extremes`` are numbers."""
        low, high = self.extremes
        return FiniteRange(low, high) if math.isfinite(low) and math.isfinite(high) else self.finite

    def is_bad(self, inf: bool) -> bool:
        """Whether the tensor holds a NaN, or (``inf``) an infinity."""
        low, high = self.extremes
        if math.isfinite(low) and math.isfinite(high):
            return False
        return inf or math.isnan(low)

    @property
    def kind(self) -> str:
        """What the tensor holds: ``"NaN"``, ``"Inf"`` or ``"-Inf"``."""
        low, high = self.extremes
        if math.isnan(low):
            return "NaN"
        return "Inf" if high == math.inf else "-Inf"

    def position(self) -> tuple[int, ...] | None:
        """The index of one bad element, or None if it is not known."""
        if self.places is None:
            return None
        flat = int(self.places[0] if self.kind != "-Inf" else self.places[1])
        size = math.prod(self.shape)
        if flat >= size:  # the two numbers of a complex one
            flat //= 2
        return unravel(flat, self.shape)


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Turns a position in the flattened tensor into an index.

    Example:
        >>> unravel(7, (2, 5))
        (1, 2)
    """
    found = []
    for size in reversed(shape):
        found.append(flat % size)
        flat //= size
    return tuple(reversed(found))


def values_of(tensor: Tensor) -> Tensor | None:
    """Returns the numbers of a tensor, flat, in a type that can be compared; None if none of them can be NaN."""
    tensor = unwrapped(tensor)
    tensor = getattr(tensor, "_local_tensor", tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_quantized or tensor.device.type == "meta":
        return None
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.float()
    return tensor if tensor.numel() else None


def probe(tensor: Tensor, path: str = "") -> Probe | None:
    """Looks at a tensor; None if it cannot hold NaN or Inf."""
    with torch.no_grad(), _outside_modes():
        values = values_of(tensor)
        return None if values is None else Probe(tensor, values, path)


def finite_range(tensor: Tensor) -> FiniteRange:
    """Looks at the finite values of a tensor that can hold others, and counts those. On an accelerator this waits."""
    with torch.no_grad(), _outside_modes():
        values = values_of(tensor)
        assert values is not None
        nan, inf = values.isnan(), values.isinf()
        finite = values[~(nan | inf)]
        if tensor.is_complex():  # its numbers are in pairs
            nan, inf = nan.any(-1), inf.any(-1)
        low, high = map(float, torch.aminmax(finite)) if finite.numel() else (math.nan, math.nan)
        return FiniteRange(low, high, int(nan.sum()), int((inf & ~nan).sum()))


def locate(found: Probe, tensor: Tensor, inf: bool) -> None:
    """Counts the bad elements of a tensor that was probed on the CPU, and finds the first of them."""
    with torch.no_grad(), _outside_modes():
        values = values_of(tensor)
        assert values is not None
        bad = (~values.isfinite() if inf else values.isnan()).reshape(-1)
        first = bad.nonzero()[0, 0]
        found.count = int(bad.sum())
        found.places = (first, first)


def read_all(probes: Sequence[Probe]) -> None:
    """Reads the extremes of many probes, with one wait for each device and type."""
    groups: dict[Any, list[Probe]] = {}
    for found in probes:
        if not found.here:
            groups.setdefault((found.extremes[0].device, found.extremes[0].dtype), []).append(found)
    with torch.no_grad(), _outside_modes():
        for group in groups.values():
            numbers = torch.stack([number for found in group for number in found.extremes]).tolist()
            for i, found in enumerate(group):
                found.extremes = (numbers[2 * i], numbers[2 * i + 1])
                found.here = True
