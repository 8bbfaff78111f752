"""Where the frames of each layer lie on the input's time axis: ``timeline(model, example)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from convtap._errors import (
    AmbiguousCall,
    InvalidValue,
    LayerNotFound,
    brief,
    did_you_mean,
    listed,
)
from convtap._public import public
from convtap._result.call import Call
from convtap._result.keys import keys_of
from convtap._select.arguments import check_arguments
from convtap._select.example import Example, forward_of, prepared
from convtap._select.module_tree import ModuleTree, resolve_name
from convtap._table import MOST, Rows, Table
from convtap._tensors.nested import walk_tensors
from convtap._time.layer_time import LayerTime, cells_of, layer_times
from convtap._time.lengths import follow
from convtap._time.padded import Cutter, Differences
from convtap._time.record import Pass, Record
from convtap._time.signal import argument_of, signal_of, time_axis


@public
def timeline(
    model: nn.Module,
    example: Example,
    *,
    time_dim: int = -1,
    signal: str | int | None = None,
    method: str | None = None,
) -> Timeline:
    """Follows the time axis of an input through a model, and says for each layer which input samples its frames see.

    The model runs once on the example, in eval mode and without gradients. (Where it computes numbers such as the end of
    a slice itself, it runs once or twice more on other lengths, to see whether they move with the length.) The model stays as
    it is: caches, statistics and random numbers are put back after each run.

    Args:
        model: any PyTorch model.
        example: a tensor or array, a tuple of positional arguments, or a mapping of keyword arguments. Its first floating-point
            tensor, or else its first tensor that is no mask, is the signal.
        time_dim: the axis of the signal that is time.
        signal: which input is the signal, by the name or the position of the argument. Layers that depend only on other
            inputs have a line that names these.
        method: the name of the method to run, such as ``"encode"``; None to call the model itself.

    Raises:
        InvalidType: the example is no tensor, array, tuple or mapping, or the model does not take it.
        InvalidValue: it has no tensor, no such axis, no such input, or the axis turns out to be no time to a convolution;
            or the model has no such method.

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
    example, forward = prepared(example, model), forward_of(model, method)
    path, found = signal_of(example, signal, forward)
    axis = time_axis(found, time_dim)
    records, tree = follow(Pass(model, path, axis, method), example)
    first = next((name for name, tensor in walk_tensors(example) if tensor.dim() > 1), path)
    return Timeline(records, int(found.shape[axis]), axis - found.dim(), tree, path, is_first=first == path)


@public
class Timeline(Mapping[str, LayerTime]):
    """The layers of a model on the time axis of its input, by name, in the order in which they ran.

    Iterating goes over the convolutions; any other module that gave out a time axis can be asked for by its name.

    Attributes:
        input_length: how many samples the example had.
        time_dim: which axis of the signal is time, counted from the end.
        signal: where the signal is in the example, such as ``"0"`` or ``"audio"``; empty if the example is a tensor.
    """

    def __init__(
        self,
        records: Sequence[Record],
        input_length: int,
        time_dim: int,
        tree: ModuleTree,
        signal: str = "",
        *,
        is_first: bool = True,
    ) -> None:
        self.input_length = input_length
        self.signal = argument_of(signal)
        self._is_first = is_first
        self.time_dim = time_dim
        self._aliases = tree.aliases
        self._names = tuple(tree.names)
        self._all: dict[str, LayerTime] = {}
        self._calls: dict[str, list[LayerTime]] = {}
        self._layers: dict[str, LayerTime] = {}
        keys = keys_of([record.name for record in records])
        for record, found in zip(records, layer_times(records, keys, input_length), strict=True):
            self._all[found.key] = found
            self._calls.setdefault(record.name, []).append(found)
            if record.is_layer:
                self._layers[found.key] = found

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
        base = resolve_name(stem.removesuffix("#"), self._calls, self._aliases) if mark else None
        if base is not None and number.isdecimal() and int(number) < len(self._calls[base]) > 1:
            return self._calls[base][int(number)]
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

    def __cutter__(self) -> Cutter:
        """Returns what cuts the outputs of a block to their valid frames."""
        return Cutter(self._layer_of, self._samples_of, Differences())

    def _samples_of(self, shape: tuple[int, ...] | None) -> int | None:
        """How many samples the inputs of a pass were padded to; None if the signal is not what the shape is of."""
        if not self._is_first:
            return None
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
        found = Rows(layers, lambda layer: (layer.key, *cells_of(layer)))
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
