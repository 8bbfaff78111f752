"""Cuts the rows of a padded batch to their valid frames, and finds which of these are not those of the input alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from convtap._errors import InvalidValue, Unsupported, listed, plural, warn_user
from convtap._result.call import Call, layout_of
from convtap._result.samples import Cut
from convtap._tensors.layout import axes_of
from convtap._time.edge import Difference
from convtap._time.layer_time import LayerTime, difference_of

#: What to write instead, at the end of every message.
REMEDY = "Run the inputs in batches of equal length, or one at a time (batch size 1), for the values that each input has alone."


class Differences:
    """What was found about the layers of padded batches: by layer, the worst of it."""

    def __init__(self) -> None:
        self.found: dict[str, Difference] = {}

    def add(self, name: str, difference: Difference | None) -> None:
        """Notes what was found for one input."""
        before = self.found.get(name)
        if difference is None or (before is not None and before.last is None):
            return
        if before is None or difference.last is None or difference.last > (before.last or 0):
            self.found[name] = difference

    def described(self) -> dict[str, str]:
        """Returns a text for each layer: ``same padding: the last 3 frames``, or ``group_norm in 'norm': every frame``."""
        return {name: _described(one) for name, one in self.found.items()}


def _described(difference: Difference) -> str:
    what, last = difference.what.removeprefix("native_").lstrip("_"), difference.last
    if last is None:
        return f"{what}: every frame"
    return f"{what}: the last {'frame' if last == 1 else plural(last, 'frame')}"


def warn(layers: Mapping[str, str]) -> None:
    """Warns once of all layers, if there are any, with the cause of each and what to write."""
    if not layers:
        return
    by_cause: dict[str, list[str]] = {}
    for name, cause in layers.items():
        by_cause.setdefault(cause, []).append(name)
    causes = listed((f"{cause} of {listed(map(repr, names), 3)}" for cause, names in by_cause.items()), 4)
    text = (
        f"the frames of {plural(len(layers), 'layer')} in padded batches are not those of each input alone, though cut to "
        f"its length. They differ by {causes}. {REMEDY}"
    )
    warn_user(text)


class Cutter:
    """Cuts the outputs of the inputs of a capture to their valid frames, and collects how they differ.

    Args:
        runs: by layer, the time axis of each of its runs.
        names: the layers, for a message.
        time_dim: which axis of a pass's first input is time; None if the signal is another input.
    """

    def __init__(self, runs: Mapping[str, Sequence[LayerTime]], names: Iterable[str], time_dim: int | None) -> None:
        self._runs = runs
        self._names = names
        self._time_dim = time_dim
        self._differences = Differences()

    def of(self, lengths: Sequence[int], shape: tuple[int, ...] | None) -> Cut:
        """Returns what cuts one input's output to its valid frames, for the inputs of one pass.

        Args:
            lengths: the samples of each input.
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
        """How many samples the inputs of a pass were padded to; None if the signal is not what the shape is of."""
        if self._time_dim is None:
            return None
        if shape is None or len(shape) < -self._time_dim:
            raise InvalidValue(
                f"the timeline's input has its time on axis {self._time_dim}, and the model was given shape {shape}. Make the "
                "timeline with an example like the inputs."
            )
        return int(shape[self._time_dim])

    def _layer_of(self, call: Call) -> LayerTime:
        """The run of a layer that a call is, in every pass anew."""
        runs = self._runs.get(call.layer)
        if runs is None:
            raise InvalidValue(
                f"the timeline has no layer {call.layer!r}; it has {listed(self._names)}. It is of another model: take "
                "timeline(model, example) of the model that ran."
            )
        return runs[call.index % len(runs)]

    def warn(self) -> None:
        """Warns of what was found, once."""
        warn(self._differences.described())


def _checked(layer: LayerTime, call: Call, path: str, tensor: Tensor, padded: int) -> int:
    """Returns which axis of one input's output is time, if the output has the shape that the timeline says."""
    assert layer.row_dim is not None
    if layer.is_time_first and axes_of(call.shape, layout_of(call, path)).batch == 0:
        raise Unsupported(
            f"{call.key!r} has the shape {tuple(call.shape)} with time on axis 0, so axis 0 is not the inputs. Read "
            f"it whole with acts[{call.key!r}], or leave it out of the selection."
        )
    expected = layer.shape_of_one(padded)
    if tuple(tensor.shape) != expected:
        raise InvalidValue(
            f"{call.key!r} has shape {tuple(tensor.shape)} for one input of {padded} samples, and by the timeline "
            f"it has {expected}. The timeline is of another model, or the output was reduced: take "
            "timeline(model, example) of the model that ran, and reduce after samples."
        )
    return layer.row_dim


def _padded(layer: LayerTime, tensor: Tensor, least: int) -> int:
    """How many samples an input was padded to that the shape of the first input does not show: as the frames say."""
    padded = least
    if layer.row_dim is not None and layer.unknown is None:
        while layer.frames_of(padded) < tensor.shape[layer.row_dim]:
            padded += 1
    return padded
