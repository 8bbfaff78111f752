"""Cuts the outputs of padded batches to their valid frames.

It also finds the valid frames that differ from those of each input alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from convtap._errors import InvalidValue, Unsupported, listed, plural, warn_user
from convtap._result.call import Call, layout_of
from convtap._result.samples import Cut
from convtap._tensors.layout import axes_of
from convtap._time.edge import Difference
from convtap._time.layer_time import LayerTime, difference_of

#: The fix at the end of every message.
REMEDY = "Run the inputs in batches of equal length, or one at a time (batch size 1), for the values that each input has alone."


class Differences:
    """The greatest difference of each layer in padded batches."""

    def __init__(self) -> None:
        self.found: dict[str, Difference] = {}

    def add(self, name: str, difference: Difference | None) -> None:
        """Adds the difference for one input, or None."""
        before = self.found.get(name)
        if difference is None or (before is not None and before.last is None):
            return
        if before is None or difference.last is None or difference.last > (before.last or 0):
            self.found[name] = difference

    def described(self) -> dict[str, str]:
        """Returns a text for each layer, such as ``same padding: the last 3 frames``."""
        return {name: _described(one) for name, one in self.found.items()}


def _described(difference: Difference) -> str:
    what, last = difference.what.removeprefix("native_").lstrip("_"), difference.last
    if last is None:
        return f"{what}: every frame"
    return f"{what}: the last {'frame' if last == 1 else plural(last, 'frame')}"


def warn(layers: Mapping[str, str]) -> None:
    """Issues one warning about all layers, with the causes and the fix."""
    if not layers:
        return
    by_cause: dict[str, list[str]] = {}
    for name, cause in layers.items():
        by_cause.setdefault(cause, []).append(name)
    causes = listed((f"{cause} of {listed(map(repr, names), 3)}" for cause, names in by_cause.items()), 4)
    text = (
        f"the valid frames of {plural(len(layers), 'layer')} in padded batches differ from those of each input alone "
        f"({causes}). {REMEDY}"
    )
    warn_user(text)


class Cutter:
    """Cuts outputs to their valid frames and collects how these differ.

    Args:
        runs: by layer, the time axis of each of its runs.
        names: the layers, for a message.
        time_dim: the time axis of a pass's first input; None if the signal is another input.
    """

    def __init__(self, runs: Mapping[str, Sequence[LayerTime]], names: Iterable[str], time_dim: int | None) -> None:
        self._runs = runs
        self._names = names
        self._time_dim = time_dim
        self._differences = Differences()

    def of(self, lengths: Sequence[int], shape: tuple[int, ...] | None) -> Cut:
        """Returns a function that cuts the output of one of a pass's inputs.

        Args:
            lengths: the number of samples of each input.
            shape: the shape of the pass's first input.
        """
        given = self._samples_of(shape)

        def cut(call: Call, path: str, tensor: Tensor, row: int) -> Tensor:
            layer = self._layer_of(call)
            padded = given if given is not None else _padded(layer, tensor, max(lengths, default=0))
            found = tensor
            if layer.unknown is not None or (layer.dim is not None and layer.path == path):
                valid = int(layer.valid_lengths([lengths[row]], padded)[0])
                found = tensor.narrow(_checked(layer, call, path, tensor, padded), 0, valid)
            self._differences.add(call.name, difference_of(layer, lengths[row], padded))
            return found

        return cut

    def _samples_of(self, shape: tuple[int, ...] | None) -> int | None:
        """Returns the samples that inputs were padded to, or None if unknown."""
        if self._time_dim is None:
            return None
        if shape is None or len(shape) < -self._time_dim:
            raise InvalidValue(
                f"the input has shape {shape}, but the timeline's input has time on axis {self._time_dim}. Make the timeline "
                "with an example like the inputs."
            )
        return int(shape[self._time_dim])

    def _layer_of(self, call: Call) -> LayerTime:
        """Returns the time axis of the run that a call is, counted anew in each pass."""
        runs = self._runs.get(call.layer)
        if runs is None:
            raise InvalidValue(
                f"the timeline has no layer {call.layer!r}, only {listed(self._names)}. Make it from the model that ran: "
                "timeline(model, example)."
            )
        return runs[call.index % len(runs)]

    def warn(self) -> None:
        """Issues one warning about the differences."""
        warn(self._differences.described())


def _checked(layer: LayerTime, call: Call, path: str, tensor: Tensor, padded: int) -> int:
    """Returns the time axis of one input's output. Raises if its shape is another one."""
    assert layer.row_dim is not None
    if layer.is_time_first and axes_of(call.shape, layout_of(call, path)).batch == 0:
        raise Unsupported(
            f"{call.key!r} has the shape {tuple(call.shape)} with time on axis 0, so axis 0 is not the inputs. Read "
            f"it whole with acts[{call.key!r}], or do not select it."
        )
    expected = layer.shape_of_one(padded)
    if tuple(tensor.shape) != expected:
        raise InvalidValue(
            f"{call.key!r} has shape {tuple(tensor.shape)} for one input of {padded} samples, but by the timeline "
            f"it has {expected}. Make the timeline from the model that ran, timeline(model, example), and apply reduce after "
            "samples, not in the capture."
        )
    return layer.row_dim


def _padded(layer: LayerTime, tensor: Tensor, least: int) -> int:
    """Returns the samples that an input was padded to, as its number of frames shows."""
    padded = least
    if layer.row_dim is not None and layer.unknown is None:
        while layer.frames_of(padded) < tensor.shape[layer.row_dim]:
            padded += 1
    return padded
