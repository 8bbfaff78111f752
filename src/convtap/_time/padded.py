"""Cuts the rows of a padded batch to their valid frames, and says which of these are not those of the input alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from convtap._errors import CoverageWarning, InvalidValue, Unsupported, listed, plural
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
        """Returns what to say of each layer."""
        return {name: described(one) for name, one in self.found.items()}


def described(difference: Difference) -> str:
    """Writes a difference: ``same padding: the last 3 frames``, or ``group_norm in 'norm': every frame``."""
    what = difference.what.removeprefix("native_").lstrip("_")
    if difference.last is None:
        return f"{what}: every frame"
    return f"{what}: the last {'frame' if difference.last == 1 else plural(difference.last, 'frame')}"


def message(layers: Mapping[str, str]) -> str:
    """Says which layers are concerned, by cause, and what to write."""
    by_cause: dict[str, list[str]] = {}
    for name, cause in layers.items():
        by_cause.setdefault(cause, []).append(name)
    causes = listed((f"{cause} of {listed(map(repr, names), 3)}" for cause, names in by_cause.items()), 4)
    return (
        f"the frames of {plural(len(layers), 'layer')} in padded batches are not those of each input alone, though cut to "
        f"its length. They differ by {causes}. {REMEDY}"
    )


def warn(layers: Mapping[str, str], stacklevel: int) -> None:
    """Warns once of all layers, if there are any."""
    if layers:
        warnings.warn(message(layers), CoverageWarning, stacklevel=stacklevel + 1)


@dataclass
class Cutter:
    """Cuts the outputs of the inputs of a block to their valid frames, and collects how they differ.

    Attributes:
        layer_of: the run of a layer that a call is.
        samples_of: from the shape of a pass's input, the samples it was padded to; None where the shape does not say.
        differences: what was found so far.
    """

    layer_of: Callable[[Call], LayerTime]
    samples_of: Callable[[tuple[int, ...] | None], int | None]
    differences: Differences

    def of(self, lengths: Sequence[int], shape: tuple[int, ...] | None) -> Cut:
        """Returns what cuts one input's output to its valid frames, for the inputs of one pass.

        Args:
            lengths: the samples of each input.
            shape: the shape of the pass's first input.
        """
        given = self.samples_of(shape)

        def cut(call: Call, path: str, tensor: Tensor, row: int) -> Tensor:
            layer = self.layer_of(call)
            padded = given if given is not None else _padded(layer, tensor, max(lengths, default=0))
            if layer.unknown is None and (layer.dim is None or layer.path != path):
                self.differences.add(call.name, difference_of(layer, lengths[row], padded))
                return tensor
            valid = int(layer.valid_lengths([lengths[row]], padded)[0])
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
            self.differences.add(call.name, difference_of(layer, lengths[row], padded))
            return tensor.narrow(layer.row_dim, 0, valid)

        return cut

    def warn(self, stacklevel: int) -> None:
        """Warns of what was found, once."""
        warn(self.differences.described(), stacklevel + 1)


def _padded(layer: LayerTime, tensor: Tensor, least: int) -> int:
    """How many samples an input was padded to that the shape of the first input does not show: as the frames say."""
    if layer.row_dim is None or layer.unknown is not None:
        return least
    frames, padded = int(tensor.shape[layer.row_dim]), least
    while layer.frames_of(padded) < frames:
        padded += 1
    return padded
