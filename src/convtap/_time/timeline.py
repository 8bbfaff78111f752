"""Where the frames of each layer lie on the input's time axis: ``timeline(model, example)``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from convtap._arguments import check_arguments
from convtap._call import Call
from convtap._errors import (
    AmbiguousCall,
    InvalidType,
    InvalidValue,
    LayerNotFound,
    OutOfRange,
    Unsupported,
    brief,
    did_you_mean,
    listed,
)
from convtap._example import Example, prepared
from convtap._layout import axes_of
from convtap._samples import Cut
from convtap._structure import walk_tensors
from convtap._table import MOST, Rows, Table
from convtap._time.follow import Record
from convtap._time.layer_time import LayerTime
from convtap._time.lengths import Doubt, follow, settle
from convtap._tree import ModuleTree, resolve_name


def timeline(model: nn.Module, example: Example, *, time_dim: int = -1) -> Timeline:
    """Follows the time axis of an input through a model, and says for each layer which input samples its frames see.

    The model runs once on the example, in eval mode and without gradients. (Where it computes numbers such as the end of
    a slice itself, it runs once or twice more on other lengths, to see whether they move with the length.) The model stays as
    it is: caches, statistics and random numbers are put back after each run.

    Args:
        model: any PyTorch model.
        example: a tensor or array, a tuple of positional arguments, or a mapping of keyword arguments. Its first floating-point
            tensor, or else its first tensor that is no mask, is the signal.
        time_dim: the axis of the signal that is time.

    Raises:
        InvalidType: the example is no tensor, array, tuple or mapping, or the model does not take it.
        InvalidValue: it has no tensor, no such axis, or the axis turns out to be no time to a convolution.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import timeline
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 10, stride=5), nn.ReLU(), nn.Conv1d(4, 8, 3, stride=2, padding=1))
        >>> times = timeline(model, torch.zeros(1, 1, 1000))
        >>> times
        layer  stride  receptive field  start  frames
        -----  ------  ---------------  -----  ------
        0           5               10      0     199
        2          10               20     -5     100
        >>> times["2"].span(3)
        (25, 45)
        >>> times["2"].valid_lengths([1000, 500])
        tensor([100,  50])
    """
    check_arguments(model, None, nn.Conv1d)
    example = prepared(example, model)
    path, signal = signal_of(example)
    axis = _axis(signal, time_dim)
    records, tree = follow(model, example, path, axis)
    doubts = settle(records, model, example, path, axis)
    return Timeline(records, int(signal.shape[axis]), axis - signal.dim(), tree, doubts)


class Timeline(Mapping[str, LayerTime]):
    """The layers of a model on the time axis of its input, by name, in the order in which they ran.

    Iterating goes over the convolutions; any other module that gave out a time axis can be asked for by its name.
    """

    def __init__(
        self,
        records: Sequence[Record],
        input_length: int,
        time_dim: int,
        tree: ModuleTree,
        doubts: Mapping[int, Doubt],
    ) -> None:
        self.input_length = input_length
        self.time_dim = time_dim
        self._aliases = tree.aliases
        self._names = tuple(tree.names)
        times = Counter(record.name for record in records)
        numbers = {name: itertools.count() for name in times}
        self._all: dict[str, LayerTime] = {}
        self._calls: dict[str, list[LayerTime]] = {}
        self._layers: dict[str, LayerTime] = {}
        for i, record in enumerate(records):
            number = next(numbers[record.name])
            key = record.name if times[record.name] == 1 else f"{record.name}#{number}"
            found = LayerTime(record, key, input_length, doubts.get(i))
            self._all[key] = found
            self._calls.setdefault(record.name, []).append(found)
            if record.is_layer:
                self._layers[key] = found

    def __getitem__(self, key: str) -> LayerTime:
        """Returns the time axis of a layer's output.

        Raises:
            LayerNotFound: no such layer gave out a time axis.
            AmbiguousCall: it ran several times.
        """
        if not isinstance(key, str):
            raise LayerNotFound(f"timeline[{brief(key)}]: keys are names, and these are here: {listed(self._layers)}.")
        found = self._all.get(key)
        if found is not None:
            return found
        stem, mark, number = key.rpartition("#")
        if mark and (base := resolve_name(stem, self._calls, self._aliases)) is not None:
            found = self._all.get(f"{base}#{number}")
            if found is not None:
                return found
        name = resolve_name(key, self._calls, self._aliases)
        if name is None:
            raise self._missing(key)
        calls = self._calls[name]
        if len(calls) > 1:
            raise AmbiguousCall(
                f"{name!r} ran {len(calls)} times, so its plain name does not say which run is meant. Take all of them "
                f"with timeline.calls({name!r}), or one with timeline[{calls[1].key!r}]."
            )
        return calls[0]

    def calls(self, name: str) -> list[LayerTime]:
        """Returns the time axis of each run of a layer, in order.

        Raises:
            LayerNotFound: no such layer gave out a time axis.
        """
        found = resolve_name(name, self._calls, self._aliases)
        if found is None:
            raise self._missing(name)
        return list(self._calls[found])

    # -- samples

    def _cutter(self, lengths: Sequence[int], shape: tuple[int, ...] | None) -> Cut:
        """Returns what cuts one input's output to its valid frames, for the inputs of one pass.

        Args:
            lengths: the samples of each input.
            shape: the shape of what the model was given.
        """
        padded = self._samples_of(shape)

        def cut(call: Call, path: str, tensor: Tensor, row: int) -> Tensor:
            layer = self._layer_of(call)
            if layer.unknown is None and (layer.dim is None or layer.path != path):
                return tensor
            valid = int(layer.valid_lengths([lengths[row]], padded)[0])
            assert layer.row_dim is not None
            if layer.is_time_first and axes_of(call.shape, call._layout(path)).batch == 0:
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
            return tensor.narrow(layer.row_dim, 0, valid)

        return cut

    def _samples_of(self, shape: tuple[int, ...] | None) -> int:
        """How many samples the inputs of a pass were padded to."""
        if shape is None or len(shape) < -self.time_dim:
            raise InvalidValue(
                f"the timeline's input has its time on axis {self.time_dim}, and the model was given shape {shape}. Make the "
                "timeline with an example like the inputs."
            )
        return int(shape[self.time_dim])

    def _layer_of(self, call: Call) -> LayerTime:
        """The run of a layer that a call is, in every pass anew."""
        runs = self._calls.get(call.layer)
        if runs is None:
            raise InvalidValue(
                f"the timeline has no layer {call.layer!r}; it has {listed(self._layers)}. It is of another model: take "
                "timeline(model, example) of the model that ran."
            )
        return runs[call.index % len(runs)]

    # -- messages

    def _missing(self, key: str) -> LayerNotFound:
        if resolve_name(key, self._names, self._aliases) is not None:
            return LayerNotFound(
                f"{key!r} gave out nothing that depends on the input in this pass, or did not run. With a time axis: "
                f"{listed(self._layers)}."
            )
        return LayerNotFound(
            f"no layer is named {key!r}. Here: {listed(self._layers)}.{did_you_mean(key, list(self._calls))}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._all or resolve_name(key, self._calls, self._aliases) is not None)

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line a convolution, whose items are their ``LayerTime``.

        Args:
            rows: the most layers to print, the first and the last; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        layers = list(self._layers.values())
        columns = ("layer", "stride", "receptive field", "start", "frames")
        title = "" if layers else "no convolution gave out anything that depends on the input"
        found = Rows(layers, lambda layer: (layer.key, *layer._cells()))
        whole = "print(times.summary(rows=None))"
        return Table(columns, found, title, self._notes(), layers, most=rows, whole=whole)

    def _notes(self) -> list[str]:
        layers = self._layers.values()
        found: list[str] = []
        for text, reasons in (
            ("unknown", [found.unknown for found in layers if found.unknown]),
            ("the receptive field is the whole input after", [one for found in layers for one in found.whole]),
            (
                "not in the receptive field: statistics over time by",
                [one for found in layers for one in found.statistics],
            ),
            ("for this length only", [one for found in layers for one in found.notes]),
        ):
            if reasons:
                found.append(f"{text}: {listed(dict.fromkeys(reasons), 4)}")
        return found

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


# -- the example


def signal_of(example: Any) -> tuple[str, Tensor]:
    """Returns the tensor of an example whose time axis is followed, and its path in it."""
    tensors = list(walk_tensors(example))
    floating = [pair for pair in tensors if pair[1].is_floating_point() or pair[1].is_complex()]
    others = [pair for pair in tensors if "mask" not in pair[0]]
    for pairs in (floating, others, tensors):
        if pairs:
            return pairs[0]
    raise InvalidValue("the example holds no tensor, so it has no time axis. Pass what the model is called with.")


def _axis(signal: Tensor, time_dim: Any) -> int:
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
