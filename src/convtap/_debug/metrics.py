"""Measures how far two outputs are apart: errors, SQNR in dB and cosine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from convtap._public import public
from convtap._spelling import printable_repr
from convtap._tensors.statistics import dtype_text

_QUANTIZED_STEP = 2.0**-8  # of the range that eight bits cover


@dataclass(frozen=True)
class Tolerance:
    """The limits within which two outputs count as equal.

    Each limit that is not None must hold. If all are None, half the digits of the coarsest type must agree.

    Attributes:
        atol: with ``rtol``: every element must have |a − b| ≤ atol + rtol · |a|.
        rtol: see ``atol``. If only one of the two is not None, the other is 0.
        sqnr_db: the minimum signal to quantization noise ratio, in dB.
    """

    atol: float | None = None
    rtol: float | None = None
    sqnr_db: float | None = None

    @property
    def text(self) -> str:
        """The limits in words."""
        parts = []
        if self.atol is not None or self.rtol is not None:
            parts.append(f"|a − b| ≤ {self.atol or 0:g} + {self.rtol or 0:g} · |a|")
        if self.sqnr_db is not None:
            parts.append(f"SQNR ≥ {self.sqnr_db:g} dB")
        return " and ".join(parts) or "relative error ≤ √ε of the coarsest type so far (half its digits)"


@public
@printable_repr
@dataclass(frozen=True)
class Difference:
    """The difference of one output of ``a`` from its partner in ``b``.

    With d = a − b over all elements, in float64: ``max_abs`` is max |d|, ``relative`` is ‖d‖₂ / ‖a‖₂, ``sqnr_db`` is
    20 · log₁₀(‖a‖₂ / ‖d‖₂), and ``cosine`` is a · b / (‖a‖₂ ‖b‖₂). A NaN or an Inf at the same place on both sides does not
    count as a difference. On one side only, it makes ``max_abs`` infinite, and the other measures are of the elements that
    are finite on both sides.

    Attributes:
        name: the call's key in ``a``.
        partner: its key in ``b``.
        shape: the shape in ``a``.
        dtypes: the types in ``a`` and ``b``.
        max_abs: the largest absolute error, or None if the shapes differ.
        relative: the relative error.
        sqnr_db: the signal to quantization noise ratio in dB; infinite if nothing differs.
        cosine: the cosine of the angle between them; None if one is zero everywhere.
        over: whether it is over the tolerance.
        note: a remark, or an empty string.
    """

    name: str
    partner: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    max_abs: float | None
    relative: float | None
    sqnr_db: float | None
    cosine: float | None
    over: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the difference as plain Python values."""
        return {**asdict(self), "shape": list(self.shape), "dtypes": list(self.dtypes)}


def step(tensor: Tensor) -> float:
    """Returns the relative step of a tensor's type.

    It is ε for a floating-point type, 2⁻⁸ for a quantized type and 0 for an exact type.
    """
    if tensor.is_quantized:
        return _QUANTIZED_STEP
    if tensor.is_floating_point() or tensor.is_complex():
        return float(torch.finfo(tensor.dtype).eps)
    return 0.0


def difference(name: str, partner: str, a: Tensor, b: Tensor, tolerance: Tolerance, coarsest: float) -> Difference:
    """Measures how far two outputs are apart.

    Args:
        coarsest: the coarsest step of the types so far, for the default tolerance.
    """
    dtypes = (dtype_text(a.dtype), dtype_text(b.dtype))
    shape = tuple(a.shape)
    if a.shape != b.shape:
        note = f"shapes differ: {shape} and {tuple(b.shape)}"
        return Difference(name, partner, shape, dtypes, None, None, None, None, True, note)
    with torch.no_grad():
        pairs = a.is_complex() or b.is_complex()
        x, y = _numbers(a, pairs), _numbers(b, pairs).to(a.device)
        note, spoilt = "", False
        if not (_is_finite(x) and _is_finite(y)):
            same = (x == y) | (x.isnan() & y.isnan())
            spoilt = bool((~same & ~(x.isfinite() & y.isfinite())).any())
            note = f"not finite: {int((~x.isfinite()).sum())} in a, {int((~y.isfinite()).sum())} in b"
            both = x.isfinite() & y.isfinite()
            x, y = x[both], y[both]
        d = x - y
        noise, signal, other = (float(torch.linalg.vector_norm(t)) for t in (d, x, y))
        largest = float(d.abs().max()) if d.numel() else 0.0
        close = tolerance.atol is None and tolerance.rtol is None
        close = close or bool((d.abs() <= (tolerance.atol or 0) + (tolerance.rtol or 0) * x.abs()).all())
        cosine = float((x * y).sum()) / (signal * other) if signal and other else None
    relative = 0.0 if not noise else noise / signal if signal else math.inf
    sqnr = math.inf if not relative else -20 * math.log10(relative) if relative < math.inf else -math.inf
    enough = tolerance.sqnr_db is None or sqnr >= tolerance.sqnr_db
    if tolerance == Tolerance():
        enough = relative <= math.sqrt(coarsest)
    over = spoilt or not close or not enough
    return Difference(name, partner, shape, dtypes, math.inf if spoilt else largest, relative, sqnr, cosine, over, note)


def _numbers(tensor: Tensor, pairs: bool) -> Tensor:
    """Returns a tensor's numbers as float64, or as float32 on MPS.

    With ``pairs``, each number is a pair of its real and imaginary part.
    """
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif pairs:
        tensor = torch.stack((tensor, torch.zeros_like(tensor)), -1)
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
