"""The public ``timeline``, which finds the time axis of each layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from convtap._errors import AmbiguousCall, LayerNotFound, brief, did_you_mean, listed
from convtap._public import public
from convtap._result.keys import keys_of
from convtap._select.arguments import check_arguments
from convtap._select.example import Example, forward_of, prepared
from convtap._select.module_tree import ModuleTree, resolve_name
from convtap._table import MOST, Rows, Table
from convtap._tensors.nested import walk_tensors
from convtap._time.layer_time import LayerTime, cells_of, layer_times
from convtap._time.lengths import follow
from convtap._time.padded import Cutter
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
    """Finds the input samples that each frame of each layer sees.

    The model runs once on the example, in eval mode and without gradients. If it computes numbers itself, such as the end of
    a slice, it runs a few more times on other lengths, to see whether the numbers move with the length. The model does not
    change: caches, statistics and random numbers are restored after each run.

    Args:
        model: any PyTorch model.
        example: a tensor or array, a tuple of positional arguments, or a mapping of keyword arguments. Its first floating-point
            tensor is the signal, or else its first tensor that is not a mask.
        time_dim: the axis of the signal that is time.
        signal: the input that is the signal, by the name or the position of the argument. Layers that depend only on other
            inputs have a row that names these inputs.
        method: the name of the method to run, such as ``"encode"``; None to call the model itself.

    Raises:
        InvalidType: the example is not a tensor, array, tuple or mapping, or the model does not accept it.
        InvalidValue: the example has no tensor, no such axis or no such input; the axis is the batch or the channels of the
            first convolution; or the model has no such method.

    Examples:
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
    return Timeline(records, int(found.shape[axis]), axis - found.dim(), tree, path, first == path)


@public
class Timeline(Mapping[str, LayerTime]):
    """The time axis of each layer's output, by name, in execution order.

    Iteration yields the convolutions. Every other module whose output has a time axis can be read by its name.

    Attributes:
        input_length: the number of samples of the example.
        time_dim: the axis of the signal that is time, counted from the end.
        signal: the place of the signal in the example, such as ``"0"`` or ``"audio"``; empty if the example is a tensor.
    """

    signal = ""  # for pickles of version 0.1.0, which have neither of these
    _is_first = True

    def __init__(
        self, records: Sequence[Record], input_length: int, time_dim: int, tree: ModuleTree, signal: str, is_first: bool
    ) -> None:
        self.input_length = input_length
        self.signal = argument_of(signal)
        self._is_first = is_first
        self.time_dim = time_dim
        self._aliases = tree.aliases
        self._names = tuple(tree.names)
        found = layer_times(records, keys_of([record.name for record in records]), input_length)
        self._all = {one.key: one for one in found}
        self._layers = {one.key: one for one, record in zip(found, records, strict=True) if record.is_layer}
        self._calls: dict[str, list[LayerTime]] = {}
        for one in found:
            self._calls.setdefault(one.name, []).append(one)

    def __getitem__(self, key: str) -> LayerTime:
        """Returns the time axis of a layer's output.

        Raises:
            LayerNotFound: no layer of this name has a time axis.
            AmbiguousCall: the layer ran several times.
        """
        if not isinstance(key, str):
            raise LayerNotFound(f"{brief(key)} is not a layer's name. Pass one of: {listed(self._layers)}.")
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
                f"{name!r} ran {len(calls)} times, so its plain name is ambiguous. Read all runs with "
                f"timeline.calls({name!r}), or one with timeline[{calls[1].key!r}]."
            )
        return calls[0]

    def calls(self, name: str) -> list[LayerTime]:
        """Returns the time axis of each run of a layer, in order.

        Raises:
            LayerNotFound: no layer of this name has a time axis.
        """
        found = resolve_name(name, self._calls, self._aliases)
        if found is None:
            raise self._missing(name)
        return list(self._calls[found])

    def __cutter__(self) -> Cutter:
        """Returns an object that cuts captured outputs to their valid frames."""
        return Cutter(self._calls, self._layers, self.time_dim if self._is_first else None)

    def _missing(self, key: str) -> LayerNotFound:
        if resolve_name(key, self._names, self._aliases) is not None:
            why = f"{key!r} did not run, or its output does not depend on the input"
            return LayerNotFound(f"{why}. Pass a layer with a time axis: {listed(self._layers)}.")
        like = did_you_mean(key, list(self._calls))
        return LayerNotFound(f"no layer is named {key!r}. The timeline has {listed(self._layers)}.{like}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._all or resolve_name(key, self._calls, self._aliases) is not None)

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line per convolution. Its items are ``LayerTime``.

        Args:
            rows: the maximum number of layers to print, the first and the last; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        layers = list(self._layers.values())
        columns = ("layer", "stride", "receptive field", "start", "frames")
        title = "" if layers else "no convolution's output depends on the input"
        found = Rows(layers, lambda layer: (layer.key, *cells_of(layer)))
        whole = "print(times.summary(rows=None))"
        return Table(columns, found, title, self._notes(), layers, most=rows, whole=whole)

    def _notes(self) -> list[str]:
        layers = self._layers.values()
        reasons = {
            "unknown": [one.unknown for one in layers if one.unknown],
            "the receptive field is the whole input after": [why for one in layers for why in one.whole],
            "not in the receptive field: statistics over time by": [why for one in layers for why in one.statistics],
            "for this length only": [why for one in layers for why in one.notes],
        }
        return [f"{text}: {listed(dict.fromkeys(found), 4)}" for text, found in reasons.items() if found]

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()
