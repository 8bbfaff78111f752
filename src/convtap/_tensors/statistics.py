"""Describes outputs: statistics of values, NumPy arrays, and shapes as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from convtap._errors import Unsupported, listed
from convtap._tensors.memory import has_no_values, parts
from convtap._tensors.nested import walk_tensors

STATISTICS = ("min", "mean", "max", "std", "zeros", "nan", "inf")


def statistics(output: Any, key: str = "") -> tuple[Any, ...]:
    """Computes ``STATISTICS`` over all tensors of an output.

    These are the minimum, mean, maximum, standard deviation, share of zeros, and the numbers of NaN and Inf.
    """
    tensors = [tensor.detach() for _, tensor in walk_tensors(output) if not has_no_values(tensor)]
    if not tensors:
        return (None,) * len(STATISTICS)
    values = torch.cat([real_values(tensor, key).reshape(-1) for tensor in tensors])
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


def real_values(tensor: Tensor, key: str = "") -> Tensor:
    tensor = tensor.values() if tensor.is_nested else ordinary(tensor, key)
    if tensor.is_complex():
        return tensor.abs()
    if not tensor.is_floating_point():
        return tensor.double()
    return tensor.float() if tensor.element_size() < 4 else tensor


def to_numpy(tensor: Tensor, key: str = "") -> Any:
    tensor = ordinary(tensor.detach(), key)
    if tensor.dtype is torch.bfloat16 or "float8" in str(tensor.dtype):
        tensor = tensor.float()
    return tensor.cpu().resolve_conj().resolve_neg().numpy()


def ordinary(tensor: Tensor, key: str = "") -> Tensor:
    """Returns the values of any tensor as an ordinary, dense tensor.

    The tensor may be quantized, sparse, distributed or another wrapper.

    Raises:
        Unsupported: if the tensor is on meta or nested, or if this process holds only a part of a DTensor.
    """
    what = f"the output of {key!r}" if key else "the output"
    if has_no_values(tensor):
        raise Unsupported(f"{what} is on meta, so it has a shape but no values. Run the model on the CPU or a GPU.")
    if tensor.is_nested:
        raise Unsupported(
            f"{what} is nested: its rows have different shapes, so it does not fit into one array. Capture it with "
            "reduce=lambda t: torch.nested.to_padded_tensor(t, 0.0)."
        )
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor if parts(tensor)[0] is tensor else _unwrapped(tensor, what)


def _unwrapped(tensor: Any, what: str) -> Tensor:
    """Returns the values of a wrapper as an ordinary tensor."""
    kind = type(tensor).__name__
    if hasattr(tensor, "placements"):
        if tensor.device_mesh.size() > 1 and not all(placement.is_replicate() for placement in tensor.placements):
            raise Unsupported(
                f"{what} is a {kind} with placements {tuple(tensor.placements)}, so this process holds only a part of it. "
                "Capture the part with reduce=lambda t: t.to_local(), or the whole tensor on every rank with "
                "reduce=lambda t: t.full_tensor()."
            )
        return ordinary(tensor.to_local())
    try:
        values = tensor.wait() if hasattr(tensor, "wait") else tensor.dequantize()
    except Exception:
        values = tensor
    if isinstance(values, Tensor) and values.shape == tensor.shape and parts(values)[0] is values:
        return values
    raise Unsupported(
        f"{what} is a {kind}, and only its own class can read its values. Pass a function as reduce= that returns an ordinary "
        "tensor."
    )


def shapes(value: Any) -> Any:
    """Returns the shape of a tensor, or the shapes in a structure as tuples and dicts."""
    if isinstance(value, Tensor):
        if value.is_nested and value.layout is torch.strided:  # a nested tensor has no shape, but its rows have
            return tuple(row.shape for row in value.unbind())
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple(shapes(item) for item in value)
    if isinstance(value, Mapping):
        return {key: shapes(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: shapes(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def shapes_text(shape: Any) -> str:
    """Formats a shape, or a structure of shapes."""
    if isinstance(shape, torch.Size):
        return str(tuple(shape))
    if isinstance(shape, (tuple, list)):
        return "(" + _some(map(shapes_text, shape), len(shape)) + ("," if len(shape) == 1 else "") + ")"
    if isinstance(shape, Mapping):
        return "{" + _some((f"{key}: {shapes_text(item)}" for key, item in shape.items()), len(shape)) + "}"
    return repr(shape)


def _some(texts: Iterable[str], count: int) -> str:
    """Joins texts. A long list is cut and ends with the number of texts."""
    return listed(texts) if count else ""


def dtype_text(dtype: Any) -> str:
    """Formats a data type without ``torch.``."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")
