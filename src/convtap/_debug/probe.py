"""Finds NaN and Inf in one tensor, from its extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convtap._public import public
from convtap._spelling import printable_repr
from convtap._torch.modes import outside_function_modes
from convtap._torch.transforms import unwrapped

# Note: [One pass over a tensor]
# Assumption: ``aminmax`` returns NaN for both extremes if any element is NaN, in one pass and without a temporary.
#   ``argmax`` and ``argmin`` return the place of a NaN before any other.
# Failure: ``isfinite().all()`` writes a mask first (ten times slower on the CPU), and a sum overflows on finite values.
# Choice: the two extremes show whether the tensor holds NaN or Inf, and are the range to print. On the CPU they are read at
#   once. On another device reading would wait for it, so the extremes and their places stay there until all of them are
#   read together.

#: The types of devices whose numbers can be read at once. On other devices, reading waits for all pending work.
READ_AT_ONCE = {"cpu"}


@public
@printable_repr
@dataclass(frozen=True)
class Range:
    """The range of a tensor's finite values, with the counts of NaN and Inf.

    Attributes:
        name: the name of the tensor; ``""`` for a module's only input.
        low: the least finite value. NaN if no value is finite, or on an accelerator if the tensor holds NaN or Inf.
        high: the greatest finite value, in the same way.
        nan: the number of NaN elements; None if ``low`` and ``high`` are not known.
        inf: the number of Inf and -Inf elements, in the same way.
    """

    name: str
    low: float
    high: float
    nan: int | None = 0
    inf: int | None = 0

    def __str__(self) -> str:
        return f"{self.name} {self._text()}".lstrip()

    def _text(self) -> str:
        if self.nan is None or self.inf is None:
            return "with NaN or Inf"
        counts = " and ".join(f"{count} {what}" for count, what in ((self.nan, "NaN"), (self.inf, "Inf")) if count)
        if self.low != self.low:
            return f"without a finite value ({counts})"
        return f"[{self.low:.4g}, {self.high:.4g}]" + (f" and {counts}" if counts else "")


class Probe:
    """The extremes of one tensor.

    Attributes:
        path: the place of the tensor in a structure; ``""`` outside of a structure.
        shape: its shape.
        dtype: its type.
        device: its device.
        extremes: its least and its greatest value, as numbers if ``here``, else as tensors.
        places: on devices other than the CPU, the flat positions of the greatest and of the least value.
        here: whether the extremes are numbers already.
        finite: the range of the finite values, if others exist; None on devices other than the CPU.
        count: the number of NaN and Inf elements, or None if they were not counted.
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
        self.finite: Range | None = None
        if not self.here:
            self.places = (values.argmax(), values.argmin())
        elif not self.is_finite:
            self.finite = finite_range(tensor, path)

    @property
    def is_finite(self) -> bool:
        """Whether the tensor holds neither NaN nor Inf, once ``extremes`` are numbers."""
        return all(map(math.isfinite, self.extremes))

    def range(self) -> Range:
        """Returns the range of the finite values, once ``extremes`` are numbers."""
        if self.is_finite:
            return Range(self.path, *self.extremes)
        return self.finite or Range(self.path, math.nan, math.nan, None, None)

    def is_bad(self, inf: bool) -> bool:
        """Returns whether the tensor holds a NaN, or (``inf``) an infinity."""
        return not self.is_finite and (inf or math.isnan(self.extremes[0]))

    @property
    def kind(self) -> str:
        """What the tensor holds: ``"NaN"``, ``"Inf"`` or ``"-Inf"``."""
        low, high = self.extremes
        if math.isnan(low):
            return "NaN"
        return "Inf" if high == math.inf else "-Inf"

    def position(self) -> tuple[int, ...] | None:
        """Returns the index of one bad element, or None if it is not known."""
        if self.places is None:
            return None
        flat = int(self.places[0] if self.kind != "-Inf" else self.places[1])
        size = math.prod(self.shape)
        if flat >= size:  # a complex number counts as two
            flat //= 2
        return unravel(flat, self.shape)


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Turns a position in the flattened tensor into an index.

    Examples:
        >>> unravel(7, (2, 5))
        (1, 2)
    """
    found = []
    for size in reversed(shape):
        found.append(flat % size)
        flat //= size
    return tuple(reversed(found))


def values_of(tensor: Tensor) -> Tensor | None:
    """Returns a tensor's numbers in a comparable type, or None if none can be NaN."""
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
    """Probes a tensor. Returns None if it cannot hold NaN or Inf."""
    with torch.no_grad(), outside_function_modes():
        values = values_of(tensor)
        return None if values is None else Probe(tensor, values, path)


def finite_range(tensor: Tensor, name: str) -> Range:
    """Returns the range of a tensor's finite values, with the counts of the others.

    On an accelerator this waits.
    """
    with torch.no_grad(), outside_function_modes():
        values = values_of(tensor)
        assert values is not None
        nan, inf = values.isnan(), values.isinf()
        finite = values[~(nan | inf)]
        if tensor.is_complex():  # numbers in pairs
            nan, inf = nan.any(-1), inf.any(-1)
        low, high = map(float, torch.aminmax(finite)) if finite.numel() else (math.nan, math.nan)
        return Range(name, low, high, int(nan.sum()), int((inf & ~nan).sum()))


def locate(found: Probe, tensor: Tensor, inf: bool) -> None:
    """Counts the bad elements of a tensor on the CPU and finds the first of them."""
    with torch.no_grad(), outside_function_modes():
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
    with torch.no_grad(), outside_function_modes():
        for group in groups.values():
            numbers = torch.stack([number for found in group for number in found.extremes]).tolist()
            for i, found in enumerate(group):
                found.extremes = (numbers[2 * i], numbers[2 * i + 1])
                found.here = True
