"""Describes outputs: statistics of their values, their shapes and types as text, and their values as NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from convtap._errors import listed
from convtap._structure import walk_tensors

STATISTICS = ("min", "mean", "max", "std", "zeros", "nan", "inf")


def statistics(output: Any) -> tuple[Any, ...]:
    """Computes min, mean, max, standard deviation and share of zeros, and counts NaN and Inf, over all tensors of an output."""
    tensors = [tensor.detach() for _, tensor in walk_tensors(output) if tensor.device.type != "meta"]
    if not tensors:
        return (None,) * len(STATISTICS)
    values = torch.cat([real_values(tensor).reshape(-1) for tensor in tensors])
    finite = values[values.isfinite()]
    if not values.numel():
        return (None, None, None, None, None, 0, 0)
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    zeros = f"{100 * int((values == 0).sum()) / values.numel():.1f}%"
    if not finite.numel():
        return (None, None, None, None, zeros, nan, inf)
    wide = finite.double() if finite.device.type != "mps" else finite
    spread = wide.std(correction=0)
    return (wide.min().item(), wide.mean().item(), wide.max().item(), spread.item(), zeros, nan, inf)


def real_values(tensor: Tensor) -> Tensor:
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    if tensor.is_complex():
        return tensor.abs()
    if not tensor.is_floating_point():
        return tensor.double()
    return tensor.float() if tensor.element_size() < 4 else tensor


def to_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    if tensor.dtype is torch.bfloat16 or "float8" in str(tensor.dtype):
        tensor = tensor.float()
    return tensor.cpu().resolve_conj().resolve_neg().numpy()


def shapes(value: Any) -> Any:
    """Returns the shape of a tensor, or the shapes in a structure as tuples and dicts."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple(shapes(item) for item in value)
    if isinstance(value, Mapping):
        return {key: shapes(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: shapes(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def shapes_text(shape: Any) -> str:
    """Writes a shape, or a structure of shapes."""
    if isinstance(shape, torch.Size):
        return str(tuple(shape))
    if isinstance(shape, (tuple, list)):
        return "(" + _some(map(shapes_text, shape), len(shape)) + ("," if len(shape) == 1 else "") + ")"
    if isinstance(shape, Mapping):
        return "{" + _some((f"{key}: {shapes_text(item)}" for key, item in shape.items()), len(shape)) + "}"
    return repr(shape)


def _some(texts: Iterable[str], count: int) -> str:
    """Joins texts, of many the first ones and how many there are."""
    return listed(texts) if count else ""


def dtype_text(dtype: Any) -> str:
    """Writes a data type without ``torch.``."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")
