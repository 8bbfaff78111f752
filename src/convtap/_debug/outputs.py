"""Reads the outputs of a side: the calls of a capture, or arrays by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convtap._debug.comparison import Run
from convtap._errors import InvalidType, InvalidValue, listed
from convtap._result.activations import Activations
from convtap._result.call import Call, is_convolution, layout_of
from convtap._select.parts import split_key
from convtap._tensors.layout import axes_of
from convtap._tensors.nested import MISSING, map_leaves, part_of, walk_tensors, with_part

# Note: [Joined calls]
# Assumption: in a capture with one pass, a layer that ran several times ran once for each chunk. In a capture with several
#   passes, each pass is a chunk, and a layer that ran twice in each pass has two outputs.
# Choice: the calls of a layer are joined in execution order, on the axis that ``axes_of`` calls time. In the second case,
#   the first calls of all passes are joined, and then the second calls. Tensors without a time axis, such as the state of
#   an LSTM, are those of the last call.


class Output(NamedTuple):
    """One output: that of a call, or an array."""

    run: Run
    value: Any
    call: Call | None = None

    def time_axis(self, path: str, tensor: Tensor) -> int | None:
        """Returns the time axis of one of its tensors, counted from the end, or None."""
        part = "" if self.call is None or self.call.part else self.run.part
        layout = None if self.call is None else layout_of(self.call, part + path)
        if layout is None and self.run.part + path:
            return None
        unbatched = tensor.dim() == 2 and self.call is not None and is_convolution(self.call)
        axes = axes_of(tensor.shape, layout, batched=not unbatched)
        return None if axes.time is None else axes.time - axes.batch


def outputs_of(side: Activations | Mapping[str, Any], other: Activations | Mapping[str, Any]) -> list[Output]:
    """Returns the outputs of a side.

    If the other side has only parts of an output, the same parts are returned.

    Raises:
        InvalidType: an array is not numeric, or a name is not a str.
        InvalidValue: the mapping is empty, or an array is masked.
    """
    if not isinstance(side, Activations):
        return _of_arrays(side, other)
    parts: dict[str, dict[str, None]] = {}
    for run in _runs(other, side):
        if run.part:
            parts.setdefault(run.layer, {})[run.part] = None
    found = []
    for call in side.calls():
        for part in ("",) if call.part else parts.get(call.layer, ("",)):
            output = part_of(call.output, part)
            if output is not MISSING:
                found.append(Output(Run(call.layer, call.index, call.part + part), output, call))
    return found


def _runs(side: Activations | Mapping[str, Any], other: Any) -> list[Run]:
    if isinstance(side, Activations):
        return [Run(call.layer, call.index, call.part) for call in side.calls()]
    layers = {call.layer for call in other.calls()} if isinstance(other, Activations) else set()
    found = []
    for name in side:
        if not isinstance(name, str):
            raise InvalidType(
                f"the name {name!r} of an array is a {type(name).__name__}, not a str. Pass {{'conv1': array}}."
            )
        layer, number, part = split_key(name, layers)
        found.append(Run(layer, number or 0, part))
    return found


def _of_arrays(side: Mapping[str, Any], other: Any) -> list[Output]:
    if not side:
        raise InvalidValue("the mapping of arrays is empty. Pass {'conv1': array}, with the outputs to compare.")
    return [Output(run, _tensors(*item)) for run, item in zip(_runs(side, other), side.items(), strict=True)]


def _tensors(name: str, value: Any) -> Any:
    """Returns arrays, or a structure of them, as tensors."""
    found = map_leaves(lambda tensor: tensor, value, other=lambda leaf: _tensor(name, leaf))
    if not any(True for _ in walk_tensors(found)):
        raise InvalidType(
            f"{name!r} is a {type(value).__name__}. Pass an array or a tensor, or a tuple or dict of them."
        )
    return found


def _tensor(name: str, value: Any) -> Tensor:
    if not hasattr(value, "__array__"):
        raise InvalidType(f"{name!r} holds a {type(value).__name__}, which is not an array. Pass {{{name!r}: array}}.")
    import numpy

    array = numpy.asanyarray(value)
    if array.dtype.kind not in "biufc":
        raise InvalidType(f"{name!r} is an array of {array.dtype}. Pass numbers: array.astype('float32').")
    if isinstance(array, numpy.ma.MaskedArray) and array.mask.any():
        raise InvalidValue(f"{name!r} is a masked array, and a tensor has no mask. Fill it first: array.filled(0.0).")
    wide = {"f": numpy.float64, "c": numpy.complex128}.get(array.dtype.kind)
    native = (
        array.dtype.newbyteorder("=") if wide is None or array.dtype.itemsize <= numpy.dtype(wide).itemsize else wide
    )
    return torch.from_numpy(numpy.array(array, native, order="C", subok=False))


def several_per_pass(outputs: list[Output]) -> set[str]:
    """Returns the names of layers that ran several times in each of several passes.

    See Note: [Joined calls].
    """
    runs = Counter((output.run.name, output.call.forward) for output in outputs if output.call is not None)
    passes = Counter(name for name, _ in runs)
    return {name for (name, _), count in runs.items() if count > 1 and passes[name] > 1}


def joined(outputs: list[Output], several: set[str]) -> tuple[list[Output], list[str]]:
    """Joins the calls of each layer on their time axis. See Note: [Joined calls].

    Args:
        several: the names of layers that have several outputs in a pass.

    Returns:
        The outputs, and the names of those that have no time axis to join them on.

    Raises:
        InvalidValue: calls differ on more than the time axis.
    """
    groups: dict[Run, list[Output]] = {}
    numbers: Counter[tuple[str, int]] = Counter()
    for output in outputs:
        run = output.run
        place = (run.name, -1 if output.call is None else output.call.forward)
        number = numbers[place] if run.name in several else 0
        numbers[place] += 1
        groups.setdefault(run._replace(number=number), []).append(output)
    found: list[Output] = []
    timeless: dict[str, None] = {}
    for run, group in groups.items():
        value = group[-1].value
        for path, tensor in walk_tensors(value) if len(group) > 1 else ():
            dim = group[-1].time_axis(path, tensor)
            if dim is None:
                timeless[run.name + path] = None
            else:
                value = with_part(value, path, _cat(run.name + path, [part_of(one.value, path) for one in group], dim))
        found.append(group[-1]._replace(run=run, value=value))
    return found, list(timeless)


def _cat(name: str, chunks: list[Any], dim: int) -> Tensor:
    try:
        return torch.cat(chunks, dim)
    except (RuntimeError, TypeError, IndexError):
        shapes = listed([str(tuple(getattr(chunk, "shape", ()))) for chunk in chunks])
        raise InvalidValue(
            f"the calls of {name!r} have shapes {shapes}, which cannot be joined on the time axis. Compare them one by one: "
            "calls='keys'."
        ) from None
