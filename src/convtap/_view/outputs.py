"""Finds the calls, the forward pass and the axes of outputs for a picture."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, LayerNotFound, NotCaptured, did_you_mean, listed
from convtap._result.call import Call, layout_of, record_of
from convtap._result.log import Log
from convtap._result.samples import Pass, Samples
from convtap._tensors.layout import Axes, Layout, axes_of, axes_with_time
from convtap._view.time_axis import Place, TimeAxis

#: What ``layers=`` accepts: names, call keys, globs and patterns; None for every call.
Chosen: TypeAlias = "str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None"


class _Position(NamedTuple):
    """The pass of a call, its layer's calls in that pass, and its number among them."""

    forward: Pass
    runs: list[Call]
    number: int


class CapturedOutputs:
    """The outputs of a log, with their axes.

    The axes come from ``channels_last`` if given, else from the timeline, else from the layer's type.

    Args:
        log: the log of the capture.
        axis: the picture's time axis, with its timeline if given.
        channels_last: True or False for all outputs, or the layers whose outputs are (B, T, C); None if unknown.
    """

    def __init__(self, log: Log, axis: TimeAxis, channels_last: bool | Chosen = None) -> None:
        self.log = log
        self.axis = axis
        self.calls = list(log.calls.values())
        if not self.calls:
            raise NotCaptured(
                "no outputs were captured, so the picture would be empty. Run the model inside the capture: "
                "with capture(model) as acts: model(x)"
            )
        self.samples = Samples(log)
        self._positions: dict[int, _Position] = {}
        for found in self.samples.passes:
            runs: dict[str, list[Call]] = {}
            for call in found.calls:
                same = runs.setdefault(call.name, [])
                self._positions[id(call)] = _Position(found, same, len(same))
                same.append(call)
        self.all_last = channels_last if isinstance(channels_last, bool) else None
        named = self.chosen(channels_last) if channels_last is not None and self.all_last is None else []
        self._named_last = {id(call) for call in named}

    def locate(self, sample: int) -> tuple[Pass, int]:
        """Returns the forward pass of one input, and the input's row there."""
        if isinstance(sample, bool) or not hasattr(type(sample), "__index__"):
            raise InvalidType(
                f"sample is a {type(sample).__name__}, not an int. Pass the number of one input, such as sample=0."
            )
        return self.samples.locate(operator.index(sample))

    def chosen(self, layers: Any) -> list[Call]:
        """Returns the calls that ``layers`` matches, in execution order; all for None."""
        if layers is None:
            return self.calls
        selectors = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
        if not selectors:
            raise InvalidValue("layers is empty. Pass layers=None for every captured layer.")
        wanted: set[int] = set()
        for selector in selectors:
            matches = self._matching(selector)
            if not matches:
                text = selector if isinstance(selector, str) else selector.pattern
                names = list(dict.fromkeys(name for call in self.calls for name in (call.name, call.key)))
                raise LayerNotFound(
                    f"no captured layer matches {text!r}. The captured calls are {listed([call.key for call in self.calls])}."
                    f"{did_you_mean(text, names)}"
                )
            wanted.update(matches)
        return [call for call in self.calls if id(call) in wanted]

    def _matching(self, selector: Any) -> set[int]:
        if not isinstance(selector, (str, re.Pattern)):
            raise InvalidType(
                f"layers has a selector of type {type(selector).__name__}. Pass a name, a call key such as 'conv#1', a glob, a "
                "re.Pattern, or a list of them."
            )
        exact = (selector, self.log.resolve(selector)) if isinstance(selector, str) else ()
        pattern = re.compile(fnmatch.translate(selector)) if isinstance(selector, str) else selector
        return {
            id(call)
            for call in self.calls
            for name in (call.name, call.key)
            if name in exact or pattern.fullmatch(name) is not None
        }

    def keys_in_pass(self) -> dict[int, str]:
        """Returns the key of each call within its pass, by id.

        It is numbered if the layer ran several times in any pass.
        """
        several = {call.name for call in self.calls if len(self._positions[id(call)].runs) > 1}
        return {
            id(call): record_of(call).key(self._positions[id(call)].number, 2 if call.name in several else 1)
            for call in self.calls
        }

    def place(self, call: Call) -> Place:
        """Returns the place of a call on the time axis."""
        _, runs, number = self._positions[id(call)]
        return self.axis.place(call.layer, None if len(runs) == 1 else number, record_of(call).separator, call.part)

    def axes(self, call: Call, path: str, tensor: Tensor) -> Axes:
        """Returns the axes of one tensor of a call. See Note: [Which axis is time]."""
        shape, batched = tuple(tensor.shape), self._is_batched(call, tensor)
        last = True if id(call) in self._named_last else self.all_last
        if last is not None:
            return axes_of(shape, Layout(last=last), batched=batched)
        layout = layout_of(call, path)
        dim = self.place(call).dim_of(path) if self.axis.has_timeline else None
        found = None if dim is None else axes_with_time(shape, dim, layout, batched=batched)
        return axes_of(shape, layout, batched=batched) if found is None else found

    def frames(self, call: Call, path: str, tensor: Tensor) -> int:
        """Returns the number of frames of an output, 1 without a time axis."""
        axes = self.axes(call, path, tensor)
        if axes.time is None:
            return 1
        row = list(tensor.shape)
        if self._is_batched(call, tensor):
            del row[axes.batch]
        return int(row[axes.time])

    def _is_batched(self, call: Call, tensor: Tensor) -> bool:
        """Returns whether an output has a batch axis.

        It does not if the model's input was a single signal without a batch axis.
        """
        found = self._positions[id(call)].forward
        return not found.single or (found.unsqueezed and tensor.dim() == 3)


def checked_count(name: str, value: Any) -> int:
    """Checks an argument that counts rows or channels."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{name} is {value!r}, not an int. Write for example {name}=64.")
    if value < 1:
        raise InvalidValue(f"{name}={value} is less than 1. Write for example {name}=64.")
    return int(value)
