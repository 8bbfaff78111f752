"""Which input of a model is the signal, and which of its axes is time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, OutOfRange, did_you_mean, listed
from convtap._structure import walk_tensors


def signal_of(example: Any, signal: str | int | None = None, forward: Any = None) -> tuple[str, Tensor]:
    """Returns the tensor of an example whose time axis is followed, and its path in it.

    Args:
        signal: the name or the position of an argument, or None for the first floating-point tensor.
        forward: what is called with the example, to find the position of a name.

    Raises:
        InvalidType: ``signal`` is neither a str nor an int.
        InvalidValue: the example has no tensor, or none at ``signal``.
    """
    tensors = list(walk_tensors(example))
    if signal is not None:
        return _chosen(tensors, example, signal, forward)
    floating = [pair for pair in tensors if pair[1].is_floating_point() or pair[1].is_complex()]
    others = [pair for pair in tensors if "mask" not in pair[0]]
    for pairs in (floating, others, tensors):
        if pairs:
            return pairs[0]
    raise InvalidValue("the example holds no tensor, so it has no time axis. Pass what the model is called with.")


def _chosen(tensors: list[tuple[str, Tensor]], example: Any, signal: Any, forward: Any) -> tuple[str, Tensor]:
    if isinstance(signal, bool) or not isinstance(signal, (str, int)):
        raise InvalidType(
            f"signal is a {type(signal).__name__}. Pass the name or the position of an argument: signal=0."
        )
    places = {str(signal)}
    names = [] if not isinstance(example, tuple) else _parameters(forward)
    if isinstance(signal, str) and signal in names:
        places.add(str(names.index(signal)))
    if isinstance(signal, int):
        keys = list(example) if isinstance(example, Mapping) else list(map(str, range(len(example))))
        places = (
            {str(key) for key in keys[signal : signal + 1 or None]} if isinstance(example, (tuple, Mapping)) else {""}
        )
    for path, tensor in tensors:
        if path in places or (path.partition(".")[0] in places and path):
            return path, tensor
    shown = [f"{path or 'the example'} {tuple(tensor.shape)}" for path, tensor in tensors]
    raise InvalidValue(
        f"signal={signal!r} names no tensor of the example, which has: {listed(shown)}."
        f"{did_you_mean(str(signal), [path for path, _ in tensors])}"
    )


def _parameters(forward: Any) -> list[str]:
    try:
        return list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return []


def time_axis(signal: Tensor, time_dim: Any) -> int:
    """Returns which axis of the signal is time, counted from the front.

    Raises:
        InvalidType: ``time_dim`` is not an int.
        OutOfRange: the signal has no such axis.
        InvalidValue: the axis has no samples.
    """
    if isinstance(time_dim, bool) or not isinstance(time_dim, int):
        raise InvalidType(f"time_dim is a {type(time_dim).__name__}, and it must be an int, such as -1 or 1.")
    if not -signal.dim() <= time_dim < signal.dim():
        raise OutOfRange(
            f"time_dim={time_dim} is no axis of the input, which has shape {tuple(signal.shape)}. "
            "For (B, C, T) it is -1, for (B, T, C) it is 1."
        )
    axis = time_dim % signal.dim()
    if not signal.shape[axis]:
        raise InvalidValue(f"axis {time_dim} of the input has no samples: its shape is {tuple(signal.shape)}.")
    return axis
