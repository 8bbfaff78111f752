"""Converts the argument ``signal`` to one input of the model as (C, T)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, plural
from convtap._result.call import layout_of
from convtap._tensors.statistics import real_values
from convtap._view.cells import Array
from convtap._view.outputs import CapturedOutputs


def one_signal(outputs: CapturedOutputs, signal: Any, sample: int) -> Array:
    """Returns one input as (C, T), from (B, C, T), (B, T), (C, T) or (T,).

    Time is the axis that the timeline followed. Without a timeline it is the last axis, or the second to last if all outputs
    are channels last, as in a Keras model.
    """
    values = _numbers(signal)
    rank = values.ndim
    if not 1 <= rank <= 3 or not values.size:
        raise InvalidValue(
            f"signal has shape {tuple(values.shape)}, which cannot be drawn. Pass the model's input as (B, C, T), (B, T), "
            "(C, T) or (T,), with at least one value."
        )
    time = _time_axis(outputs, rank)
    if rank == 3 or (rank == 2 and _has_batch(outputs, tuple(values.shape))):
        values = np.moveaxis(values, 1 if time == -rank else 0, 0)
        values = values[_row(outputs, len(values), sample)]
        time = max(time, 1 - rank)  # a row of (T, B, C) is (T, C)
    return np.moveaxis(values, time, -1) if values.ndim == 2 else values[None]


def _numbers(signal: Any) -> Array:
    if isinstance(signal, Tensor):
        if signal.device.type == "meta":
            raise InvalidType("signal is on the meta device and has no values. Pass a tensor with values.")
        return np.asarray(real_values(signal.detach()).cpu().numpy())
    if isinstance(signal, (dict, str, bytes)):
        raise InvalidType(
            f"signal is a {type(signal).__name__}, not a tensor. Pass one tensor: signal=inputs['input_values']."
        )
    try:
        values = np.asarray(signal)
        if values.dtype.kind == "c":
            values = np.abs(values)
        if values.dtype.kind not in "biuf":
            raise TypeError
        return values.astype(np.float64)
    except (TypeError, ValueError):
        raise InvalidType(
            f"signal is a {type(signal).__name__}, not a tensor or an array of numbers. Pass the model's input: signal=x."
        ) from None


def _time_axis(outputs: CapturedOutputs, rank: int) -> int:
    """Returns the time axis of a signal, counted from the end."""
    dim = outputs.axis.signal_dim
    if dim is not None and -rank <= dim < 0:
        return int(dim)
    if rank < 3 or outputs.axis.has_timeline:
        return -1
    if outputs.all_last is not None:
        return -2 if outputs.all_last else -1
    keras = [layout_of(call, "") for call in outputs.calls if call.via == "keras"]
    return -2 if keras and all(found is not None and found.last for found in keras) else -1


def _has_batch(outputs: CapturedOutputs, shape: tuple[int, ...]) -> bool:
    """Returns whether axis 0 of a two-axis signal counts inputs.

    It does in the model's own input, unless that was a single (C, T).
    """
    passes = outputs.samples.passes
    if any(found.single for found in passes):
        return False
    inputs = [given for given in outputs.log.inputs.values() if given is not None]
    if any(tuple(given) == shape for given in inputs):
        return True
    return bool(inputs) and all(len(given) == 2 for given in inputs) and shape[0] == sum(found.size for found in passes)


def _row(outputs: CapturedOutputs, rows: int, sample: int) -> int:
    """Returns the row of one input in a signal of all inputs or of one forward pass."""
    found, row = outputs.locate(sample)
    total = sum(one.size for one in outputs.samples.passes)
    if rows == total:
        return sample % total
    if rows == found.size:
        return row
    raise InvalidValue(
        f"signal has {plural(rows, 'input')} along axis 0, but the capture has {total}. Pass the model's input batch, or one "
        "input as (C, T) or (T,)."
    )
