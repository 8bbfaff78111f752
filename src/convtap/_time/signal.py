"""Finds the input of a model that is the signal, and the axis that is time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convtap._errors import ConvtapError, InvalidType, InvalidValue, OutOfRange, did_you_mean, listed
from convtap._tensors.nested import walk_tensors


def signal_of(example: Any, signal: str | int | None = None, forward: Any = None) -> tuple[str, Tensor]:
    """Returns the path and the tensor of an example's signal.

    Args:
        signal: the name or the position of an argument, or None for the first floating-point tensor.
        forward: the function that takes the example, to find the position of a name.

    Raises:
        InvalidType: ``signal`` is neither a str nor an int.
        InvalidValue: the example has no tensor, or ``signal`` names none of its tensors.
    """
    tensors = list(walk_tensors(example))
    if signal is not None:
        return _chosen(tensors, example, signal, forward)
    floating = [pair for pair in tensors if pair[1].is_floating_point() or pair[1].is_complex()]
    others = [pair for pair in tensors if "mask" not in pair[0]]
    for pairs in (floating, others, tensors):
        if pairs:
            return pairs[0]
    raise InvalidValue("the example holds no tensor, so it has no time axis. Pass the arguments of the model.")


def likely_signals(example: Any, longest: int, time_dim: int, forward: Any) -> list[str]:
    """Returns the paths of the tensors that may be the signal, the likeliest first.

    Tensors whose time axis is as long as the longest row come first, then longer ones. Among these, tensors that are called
    a mask, or are not floating-point, come last.

    Raises:
        InvalidValue: no tensor has two axes.
        OutOfRange: no tensor has the axis ``time_dim``.
    """
    found, failure = [], None
    names = {path: " ".join(names) for names, path in _arguments(example, forward)}
    for number, (path, tensor) in enumerate(walk_tensors(example)):
        if tensor.dim() < 2:
            continue
        try:
            samples = int(tensor.shape[time_axis(tensor, time_dim)])
        except ConvtapError as error:
            failure = failure or error
            continue
        size = 0 if samples == longest else 1 if samples > longest else 2
        mask = "mask" in path or "mask" in names.get(path.partition("]")[0] + "]", "")
        found.append((size, mask, not (tensor.is_floating_point() or tensor.is_complex()), number, path))
    if not found:
        raise failure or InvalidValue(
            "lengths= needs an input tensor (B, T) or (B, C, T), and the batch has none. Pass the signal as a tensor."
        )
    return [path for *_, path in sorted(found)]


def argument_of(path: str) -> str:
    """Returns a path as the user writes it: ``audio[0]`` instead of ``[audio][0]``."""
    head, _, rest = path.removeprefix("[").partition("]")
    return head + rest


def _chosen(tensors: list[tuple[str, Tensor]], example: Any, signal: Any, forward: Any) -> tuple[str, Tensor]:
    if isinstance(signal, bool) or not isinstance(signal, (str, int)):
        raise InvalidType(
            f"signal is a {type(signal).__name__}. Pass the name or the position of an argument: signal=0."
        )
    known = _arguments(example, forward)
    if isinstance(signal, int):
        places = [path for _, path in known[signal : signal + 1 or None]]
    else:
        places = [
            path + signal[len(name) :]
            for names, path in known
            for name in names
            if signal == name or signal.startswith(f"{name}[")
        ]
    for path, tensor in tensors:
        if any(path == place or path.startswith(f"{place}[") for place in places):
            return path, tensor
    shown = [f"{argument_of(path) or 'the example'} {tuple(tensor.shape)}" for path, tensor in tensors]
    raise InvalidValue(
        f"signal={signal!r} names no tensor of the example. Pass one of: {listed(shown)}."
        f"{did_you_mean(str(signal), [argument_of(path) for path, _ in tensors])}"
    )


def _arguments(example: Any, forward: Any) -> list[tuple[list[str], str]]:
    """Returns the arguments in an example: the names of each, and its path."""
    if isinstance(example, Mapping):
        return [([str(key)], f"[{key}]") for key in example]
    try:
        names = list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        names = []
    if isinstance(example, Tensor):
        return [(["0", *names[:1]], "")]
    places = getattr(example, "_fields", range(len(example)))
    return [([str(i), *names[i : i + 1]], f"[{place}]") for i, place in enumerate(places)]


def checked_time_dim(time_dim: Any) -> int:
    """Checks that ``time_dim`` is an int and returns it.

    Raises:
        InvalidType: it is not an int.
    """
    if isinstance(time_dim, bool) or not isinstance(time_dim, int):
        raise InvalidType(f"time_dim is a {type(time_dim).__name__}. Pass an int, such as -1 or 1.")
    return int(time_dim)


def time_axis(signal: Tensor, time_dim: Any) -> int:
    """Returns the axis of the signal that is time, counted from the front.

    Raises:
        InvalidType: ``time_dim`` is not an int.
        OutOfRange: the signal has no such axis.
        InvalidValue: the axis has no samples.
    """
    time_dim = checked_time_dim(time_dim)
    if not -signal.dim() <= time_dim < signal.dim():
        raise OutOfRange(
            f"time_dim={time_dim} is not an axis of the input, which has shape {tuple(signal.shape)}. "
            "Pass time_dim=-1 for (B, C, T), or time_dim=1 for (B, T, C)."
        )
    axis: int = time_dim % signal.dim()
    if not signal.shape[axis]:
        raise InvalidValue(
            f"axis {time_dim} of the input with shape {tuple(signal.shape)} has no samples. Pass an input with samples."
        )
    return axis
