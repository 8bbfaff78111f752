"""What is to be drawn of a capture: for one input, each call's cells, where they lie on the time axis, and what to say."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from convtap._call import Call
from convtap._cells import Array, Cells, colour_limit, edges, envelope, shrink
from convtap._errors import (
    InvalidType,
    InvalidValue,
    LayerNotFound,
    NotCaptured,
    OutOfRange,
    Unsupported,
    did_you_mean,
    listed,
    plural,
)
from convtap._policy import walk_tensors
from convtap._samples import Samples
from convtap._stats import real_values
from convtap._timeaxis import TimeAxis

if TYPE_CHECKING:
    from convtap._result import Activations

Chosen: TypeAlias = "str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None"

#: Modules whose output has its channels on the last axis.
_CHANNELS_LAST = frozenset(
    {"Linear", "NonDynamicallyQuantizableLinear", "LayerNorm", "RMSNorm", "Embedding", "LSTM", "GRU", "RNN"}
)

#: More bars than this are drawn as ranges of neighbouring channels.
MAX_BARS = 256


@dataclass(frozen=True)
class Picture:
    """One call's output for one input, ready to be drawn.

    Attributes:
        key: the call.
        shape: the shape of the output for this input, such as (C, T).
        kind: a map over time; bars, where there is no time axis; or nothing, where only the note can be shown.
        cells: the map's cells; for bars two rows, the lower and the upper ends.
        channels: how many channels there are.
        frames: how many frames (1 for bars).
        limit: the magnitude that gets the full colour.
        bad: how many values are NaN, and how many Inf.
        extent: where the map begins and ends on the time axis, in its unit, or None if it has no place on it.
        notes: what else to say about it.
    """

    key: str
    shape: tuple[int, ...]
    kind: Literal["map", "bars", "nothing"]
    cells: Array
    channels: int = 0
    frames: int = 0
    limit: float = 1.0
    bad: tuple[int, int] = (0, 0)
    extent: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """How much of it is no number, or nothing."""
        return ", ".join(f"{count:,} {name}" for count, name in zip(self.bad, ("NaN", "Inf"), strict=True) if count)


def pictures(
    acts: Activations, sample: int, layers: Chosen, *, rows: int, columns: int, axis: TimeAxis, most: int | None = None
) -> tuple[list[Picture], int]:
    """Prepares what is drawn of each chosen call for one input, one call at a time, and counts the calls there are.

    Raises:
        NotCaptured: there are no outputs.
        LayerNotFound: ``layers`` names nothing that is here, or nothing that ran on this input.
        OutOfRange: there is no such input.
    """
    calls = chosen(acts, layers)
    position, found = pass_of(acts, sample)
    within = {id(call) for call in found.calls}
    here = [call for call in calls if id(call) in within]
    if not here:
        raise LayerNotFound(
            f"{listed([call.key for call in calls])}: captured, but not in the forward pass of sample {sample}. "
            f"That pass has {listed([call.key for call in found.calls])}."
        )
    repeated = _repeated(here)
    places = [axis.entry(call.key, call.name, alone=call.name not in repeated) for call in here[:most]]
    for call, place in zip(here, places, strict=False):
        axis.widen(*(axis.extent(place, _frames(call, tensor)) for _, tensor in walk_tensors(call._shown)))
    drawn: list[Picture] = []
    for call, place in zip(here, places, strict=False):
        for path, tensor in walk_tensors(call.output):
            key = f"{call.key}.{path}" if path else call.key
            try:
                cut = found._cut(key, tensor, position)
            except Unsupported as error:
                note = str(error).partition(". ")[0] + "."
                drawn.append(Picture(key, tuple(tensor.shape), "nothing", np.zeros((0, 0)), notes=(note,)))
                continue
            drawn.append(_picture(key, cut, map_kind(call), rows, columns, axis, place))
    return drawn, len(here)


def map_kind(call: Call) -> Literal["last", ""]:
    """Whether a call's channels are on its last axis."""
    return "last" if call.via == "module" and call._tally.kind in _CHANNELS_LAST else ""


def _frames(call: Call, tensor: Tensor) -> int:
    if tensor.dim() < 2:
        return 1
    return tensor.shape[-2 if map_kind(call) else -1]


def _repeated(calls: list[Call]) -> set[str]:
    names = [call.name for call in calls]
    return {name for name in names if names.count(name) > 1}


def pass_of(acts: Activations, sample: int) -> tuple[int, Any]:
    """The forward pass that had an input in it, and the input's row there."""
    try:
        if isinstance(sample, bool):
            raise TypeError
        number = operator.index(sample)
    except TypeError:
        raise InvalidType(
            f"sample is a {type(sample).__name__}, and it must be the number of one input: sample=0 for the first."
        ) from None
    passes = Samples(acts._log)._passes
    total = sum(found.size for found in passes)
    if not -total <= number < total:
        raise OutOfRange(f"there is no sample {sample}: {plural(total, 'input')} here, numbered from 0.")
    rest = number % total
    for found in passes:
        if rest < found.size:
            return rest, found
        rest -= found.size
    raise AssertionError("unreachable")


def chosen(acts: Activations, layers: Chosen) -> list[Call]:
    """The calls that some names, call keys, globs and patterns mean, in execution order.

    Raises:
        NotCaptured: there are no calls at all.
        LayerNotFound: one of them means nothing that is here.
        InvalidValue: there are none of them.
    """
    calls = acts.calls()
    if not calls:
        raise NotCaptured(
            "there is nothing to draw: no outputs were captured. Run the model inside the block: "
            "with capture(model) as acts: model(x)"
        )
    if layers is None:
        return calls
    given = [layers] if isinstance(layers, (str, re.Pattern)) else layers
    if not isinstance(given, Iterable):
        raise _no_choice(layers)
    selectors = list(given)
    if not selectors:
        raise InvalidValue("layers is empty, so nothing would be drawn. Pass None for every captured layer.")
    wanted: set[int] = set()
    for selector in selectors:
        matches = [id(call) for call in calls if _means(acts, selector, call)]
        if not matches:
            text = selector if isinstance(selector, str) else selector.pattern
            names = list(dict.fromkeys(name for call in calls for name in (call.name, call.key)))
            raise LayerNotFound(
                f"no captured layer matches {text!r}. Captured here: {listed([call.key for call in calls])}."
                f"{did_you_mean(text, names)}"
            )
        wanted.update(matches)
    return [call for call in calls if id(call) in wanted]


def _means(acts: Activations, selector: Any, call: Call) -> bool:
    if isinstance(selector, re.Pattern):
        return any(selector.fullmatch(name) is not None for name in (call.name, call.key))
    if not isinstance(selector, str):
        raise _no_choice(selector)
    names = (call.name, call.key)
    return (
        selector in names
        or acts._resolve(selector) == call.name
        or any(fnmatch.fnmatchcase(n, selector) for n in names)
    )


def _no_choice(value: Any) -> InvalidType:
    return InvalidType(
        f"layers: {type(value).__name__} chooses nothing here. Pass a name, a call key such as 'conv#1', a glob, "
        "a re.Pattern, or several of them in a list."
    )


# -- one output


def _picture(key: str, tensor: Tensor, kind: str, rows: int, columns: int, axis: TimeAxis, place: Any) -> Picture:
    shape = tuple(tensor.shape)
    if not tensor.numel() or tensor.device.type == "meta":
        why = "it has no values (meta device)." if tensor.numel() else "it is empty."
        return Picture(key, shape, "nothing", np.zeros((0, 0)), notes=(why,))
    values, notes = as_map(tensor, kind)
    channels, frames = values.shape
    bad = (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    if frames == 1:
        each = "one bar a channel" if channels <= MAX_BARS else "each bar the range of neighbouring channels"
        notes.append(f"no time axis: {each}")
        return Picture(key, shape, "bars", bar_cells(values[:, 0]), channels, 1, bad=bad, notes=tuple(notes))
    return _map(key, shape, values, rows, columns, axis, axis.extent(place, frames), bad, notes)


def signal_map(values: Array, rows: int, columns: int, axis: TimeAxis) -> Picture:
    """A signal of many channels, (C, T), as a map."""
    bad = (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    extent = axis.signal_extent(values.shape[1])
    return _map("signal", values.shape, values, rows, columns, axis, extent, bad, [])


def _map(
    key: str,
    shape: tuple[int, ...],
    values: Array,
    rows: int,
    columns: int,
    axis: TimeAxis,
    extent: tuple[float, float] | None,
    bad: tuple[int, int],
    notes: list[str],
) -> Picture:
    channels, frames = values.shape
    cells = shrink(values, rows, axis.columns_for(extent, columns))
    notes.extend(_shrunk(cells))
    if axis.has_timeline and extent is None:
        notes.append("not on the time axis: drawn over its own frames")
    limit = colour_limit(cells.values)
    notes.append(_range(cells.values, limit))
    return Picture(key, shape, "map", cells.values, channels, frames, limit, bad, extent, tuple(notes))


def as_map(tensor: Tensor, kind: str = "") -> tuple[Array, list[str]]:
    """One input's output as (C, T) numbers, and what was done to make it that."""
    notes = []
    if tensor.is_complex():
        notes.append("magnitudes of complex values")
    array: Array = real_values(tensor.detach()).cpu().numpy()
    if array.ndim < 2:
        return array.reshape(-1, 1), notes
    if kind == "last":
        array = np.moveaxis(array, -1, 0)
        notes.append("channels are its last axis")
        return array.reshape(array.shape[0], -1), notes
    if array.ndim > 2:
        notes.append("the axes before the last one are joined")
    return array.reshape(-1, array.shape[-1]), notes


def bar_cells(values: Array) -> Array:
    """The lower and upper ends of bars from zero; of more than MAX_BARS values neighbours share one, with their range."""
    low, high = envelope(values, edges(len(values), MAX_BARS))
    return np.stack([np.where(low > 0, 0, low), np.where(high < 0, 0, high)])


def _shrunk(cells: Cells) -> list[str]:
    notes = []
    if cells.channels_per_row > 1:
        notes.append(f"{cells.channels_per_row} channels a row")
    if cells.frames_per_pair:
        notes.append(f"min and max of {cells.frames_per_pair:,} frames")
    return notes


def _range(cells: Array, limit: float) -> str:
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        return "no finite value"
    peak = float(np.abs(finite).max())
    if not peak:
        return "all zero"
    return f"colour ±{limit:.3g}, peak {peak:.3g}"
