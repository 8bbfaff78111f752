"""The input signal of a picture: one input's channels over time, out of whatever the model was given."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, plural
from convtap._result.activations import Activations, log_of
from convtap._result.call import layout_of
from convtap._result.samples import Samples
from convtap._tensors.statistics import real_values
from convtap._view.cells import Array
from convtap._view.timeaxis import TimeAxis


def one_signal(acts: Activations, signal: Any, sample: int, axis: TimeAxis, channels_last: Any = None) -> Array:
    """Returns one input as (C, T): ``signal`` is what the model was given, as (B, C, T), (B, T), (C, T) or (T,).

    With more than one axis, the timeline's ``time_dim`` says which is time; without a timeline it is the last one, or the one
    before it if all is channels last, as in a Keras model.

    Raises:
        InvalidType: it is no tensor and no array of numbers.
        InvalidValue: it has no time axis, is empty, or has not one row an input.
    """
    values = _numbers(signal)
    if not 1 <= values.ndim <= 3 or not values.size:
        raise InvalidValue(
            f"signal has shape {tuple(values.shape)}, and it must be the input of the model as (B, C, T), (B, T), (C, T) "
            "or (T,), with at least one value."
        )
    passes = Samples(log_of(acts)).passes
    sizes = [found.size for found in passes]
    dim = _time_dim(acts, axis, channels_last, values.ndim)
    if values.ndim == 3 or (values.ndim == 2 and _has_batch(acts, tuple(values.shape), sizes)):
        batch = 1 if dim == -values.ndim else 0
        values = np.moveaxis(values, batch, 0)
        values = values[_row(len(values), sizes, sample)]
        dim = dim if dim > -values.ndim else -values.ndim
    return np.moveaxis(values, dim, -1) if values.ndim == 2 else values[None]


def _time_dim(acts: Activations, axis: TimeAxis, channels_last: Any, rank: int) -> int:
    """Which axis of a signal is time, counted from the end."""
    if axis.signal_dim is not None and -rank <= axis.signal_dim < 0:
        return int(axis.signal_dim)
    if rank < 2 or axis.has_timeline:
        return -1
    if isinstance(channels_last, bool):
        return -2 if channels_last and rank == 3 else -1
    keras = [layout_of(call, "") for call in acts.calls() if call.via == "keras"]
    return -2 if rank == 3 and keras and all(found is not None and found.last for found in keras) else -1


def _numbers(signal: Any) -> Array:
    if isinstance(signal, Tensor):
        if signal.device.type == "meta":
            raise InvalidType("signal is on the meta device, so it has no values to draw.")
        return np.asarray(real_values(signal.detach()).cpu().numpy())
    if isinstance(signal, (dict, str, bytes)):
        raise InvalidType(
            f"signal is a {type(signal).__name__}, and it must be the tensor to draw: signal=inputs['input_values']."
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
            f"signal is a {type(signal).__name__}, and it must be a tensor or an array of numbers, such as the model's input."
        ) from None


def _has_batch(acts: Activations, shape: tuple[int, ...], sizes: list[int]) -> bool:
    """Whether axis 0 of a two-axis signal counts inputs: so it does in the model's own input, unless that was one (C, T)."""
    inputs = [given for given in log_of(acts).inputs.values() if given is not None]
    single = any(found.single for found in Samples(log_of(acts)).passes)
    if single:
        return False
    if any(tuple(given) == shape for given in inputs):
        return True
    two_axes = all(len(given) == 2 for given in inputs)
    return bool(inputs) and two_axes and shape[0] == sum(sizes)


def _row(rows: int, sizes: list[int], sample: int) -> int:
    """The row of a signal that an input is: of all inputs of the block, or of the inputs of its own pass."""
    total = sum(sizes)
    number = sample % total
    if rows == total:
        return number
    for size in sizes:
        if number < size:
            break
        number -= size
    if rows == size:
        return number
    raise InvalidValue(
        f"signal has {plural(rows, 'input')} along axis 0, and the block has {total}. Pass the batch that the model was "
        "given, or the one input itself as (C, T) or (T,)."
    )
