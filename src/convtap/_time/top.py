"""Which input windows drive a layer's channels most, over a whole data set: ``top(model, data, layer, k)``."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convtap._capture.capture import Capture
from convtap._errors import InvalidType, InvalidValue, NonFiniteOutput, OutOfRange, Unsupported, brief, listed, plural
from convtap._public import public
from convtap._select.batch import Inputs, as_example, called_with, naming_inputs
from convtap._select.example import Example, called, is_array, looking, moved, own_tensors
from convtap._table import Table
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import real_values
from convtap._time.layer_time import LayerTime
from convtap._time.signal import signal_of
from convtap._time.timeline import timeline


@public
class Window(NamedTuple):
    """A piece of an input that a frame saw.

    Attributes:
        values: the piece, such as (C, W); zeros where it leaves the signal.
        inside: (W,) of bool: which of its samples are in the signal.
    """

    values: Tensor
    inside: Tensor


@public
@dataclass(frozen=True)
class Hit:
    """One frame that drove a channel high.

    Attributes:
        sample: which input of the data set, from 0.
        channel: which channel of the layer.
        start: the first input sample that the frame saw; below 0 if it saw padding.
        stop: the one after the last.
        value: the layer's output there.
        frame: which frame.
    """

    sample: int
    channel: int
    start: int
    stop: int
    value: float
    frame: int
    _rank: int = field(default=2, repr=False, compare=False)
    _time_dim: int = field(default=-1, repr=False, compare=False)

    def window(self, x: Any) -> Window:
        """Cuts out what the frame saw, with zeros where it saw padding.

        Args:
            x: the input of this sample, such as (C, T); or all inputs, such as (N, C, T) or a data set.

        Raises:
            OutOfRange: ``x`` holds all inputs, and not this one.
            InvalidType: it is no tensor, and ``x[sample]`` is none either.
        """
        signal = self._signal(x).movedim(self._time_dim, -1)
        size = int(signal.shape[-1])
        places = torch.arange(self.start, self.stop, device=signal.device)
        inside = (places >= 0) & (places < size)
        values = signal[..., places.clamp(0, size - 1)].masked_fill(~inside, 0)
        return Window(values.movedim(-1, self._time_dim), inside)

    def _signal(self, x: Any) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == self._rank:
            return x
        try:
            found = x[self.sample]
        except (IndexError, KeyError):
            raise OutOfRange(
                f"this hit is in sample {self.sample}, and x holds {plural(len(x), 'input')}. Pass the input of that sample, "
                "or all inputs of the data set."
            ) from None
        except TypeError:
            found = x
        found = found[0] if isinstance(found, (tuple, list)) else found
        if not isinstance(found, Tensor) or found.dim() != self._rank:
            shape = f"has shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"is a {type(found).__name__}"
            raise InvalidType(
                f"x {shape}, and one input has {self._rank} axes. Pass the input of sample {self.sample}, or all inputs."
            )
        return found


@public
def top(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    layer: str,
    k: int,
    *,
    inputs: Inputs | None = None,
    channels: int | Sequence[int] | None = None,
    per_sample: int = 1,
    threshold: float | None = None,
    example: Example | None = None,
    time_dim: int = -1,
) -> Table:
    """Finds the k highest values of each channel of a layer over a data set, and the input window that each frame saw.

    One pass over the data, in eval mode and without gradients; what is kept is k values a channel, however long the data.
    Of equal values the earlier one is kept. The model stays as it is: what the pass changes in it, such as the caches of a
    streaming model, is put back at the end.

    Args:
        model: any PyTorch model.
        data: batches, as a ``DataLoader`` or any iterable yields them, or one batch as a tensor or array.
        layer: the layer's name.
        k: how many hits a channel.
        inputs: turns a batch into ``(args, kwargs)`` for the model. By default a tensor or array is passed, a mapping is
            passed as keywords, and of a tuple or list, such as (x, labels), the first element is passed.
        channels: which channels; None for all.
        per_sample: how many hits a channel may have in one input (frames side by side see nearly the same window).
        threshold: the least value of a hit; None for no limit.
        example: what to make the timeline with; None for the first input of the data.
        time_dim: the axis of the input that is time, as in ``timeline``.

    Returns:
        A table of ``Hit``, by channel and then from the highest value down.

    Raises:
        LayerNotFound: there is no such layer.
        AmbiguousCall: it runs several times (``name#1`` is one of its runs).
        Unsupported: its time axis is unknown or gone, or its rows are not the inputs.
        NonFiniteOutput: it gave NaN.
        InvalidType: the model refuses a batch as it is passed by default.
        InvalidValue: there are no batches, or a number makes no sense.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import top
        >>> model = nn.Sequential(nn.Conv1d(1, 1, 3, bias=False))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> x = torch.zeros(2, 1, 50)
        >>> x[1, 0, 20:23] = 1.0
        >>> top(model, x, "0", 1)
        sample  channel  start  stop  value
        ------  -------  -----  ----  -----
             1        0     20    23      3
    """
    k, per_sample = _positive(k, "k"), _positive(per_sample, "per_sample")
    if not isinstance(layer, str):
        raise InvalidType(f"layer is a {type(layer).__name__}. Pass one layer's name, such as 'encoder.conv1'.")
    search = _Search(model, layer, k, channels, per_sample, threshold, example, time_dim, inputs)
    batches: Iterable[Any] = [data] if isinstance(data, Tensor) or is_array(data) else _iterable(data)
    with looking(model):
        for batch in batches:
            search.add(batch)
    return search.table()


@dataclass
class _Search:
    """The best frames so far, and what they are searched with."""

    model: nn.Module
    name: str
    k: int
    channels: int | Sequence[int] | None
    per_sample: int
    threshold: float | None
    example: Any
    time_dim: int
    inputs: Inputs | None = None
    _layer: LayerTime | None = None
    _best: tuple[Tensor, ...] | None = None
    _numbers: Sequence[int] = ()
    _seen: int = 0
    _rank: int = 2

    def add(self, batch: Any) -> None:
        """Runs one batch and keeps the best of it and of what there was."""
        args, kwargs = called_with(self.inputs, batch, self.model)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        with naming_inputs(self.inputs, batch, self.model):
            call = own_tensors(moved(as_example(self.model, args, kwargs), device))
            values = self._values(self._layer or self._found(call), call)
        channels = values.shape[1]
        if self._best is None:
            self._numbers = _chosen(self.channels, channels, self.name)
        if channels <= max(self._numbers):
            raise Unsupported(f"{self.name!r} had {max(self._numbers) + 1} channels or more, and now {channels}.")
        self._keep(values[:, self._numbers])
        self._seen += len(values)

    def _found(self, call: Any) -> LayerTime:
        """Makes the timeline, with the first input of a batch if there is no example."""
        signal = signal_of(call)[1]

        def cut(value: Any) -> Any:
            return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == len(signal) else value

        first = {key: cut(value) for key, value in call.items()} if isinstance(call, dict) else tuple(map(cut, call))
        times = timeline(self.model, first if self.example is None else self.example, time_dim=self.time_dim)
        # counted from the end, since one input has no batch axis
        self._layer, self.time_dim, self._rank = times[self.name], times.time_dim, signal.dim() - 1
        return self._layer

    def _values(self, layer: LayerTime, call: Any) -> Tensor:
        """The layer's output as (B, C, T)."""
        signal = signal_of(call)[1]
        samples = int(signal.shape[self.time_dim])
        if samples != layer.input_length and (layer.whole or layer.notes):
            raise Unsupported(
                f"{layer.key!r} sees windows that hold for {layer.input_length} samples only "
                f"({listed([*layer.whole, *layer.notes], 2)}), and an input has {samples}. Pass inputs of one length."
            )
        with Capture(self.model, layer.name, functional=True) as acts:  # whole passes: a model may keep state
            called(self.model, call)
        output = dict(walk_tensors(acts[layer.key]))[layer.path]
        rows, frames = len(signal), layer.frames_of(samples)
        assert layer.dim is not None
        inputs = 1 if layer.is_time_first else 0
        if output.dim() < 2 or output.shape[inputs] != rows or output.shape[layer.dim] != frames:
            raise Unsupported(
                f"{layer.key!r} has shape {tuple(output.shape)} for {plural(rows, 'input')} of {samples} samples, and by "
                f"the timeline axis {inputs} is the inputs and axis {layer.dim} has {frames} frames. "
                "Pass an example of the data's length."
            )
        # of complex numbers the magnitudes, as in pictures and statistics
        output = real_values(output.movedim(layer.dim, -1).reshape(rows, -1, frames))
        if bool(output.isnan().any()):
            row = int(output.isnan().flatten(1).any(1).nonzero()[0])
            raise NonFiniteOutput(f"{layer.key!r} gives NaN for input {self._seen + row}, so nothing is highest there.")
        return output

    def _keep(self, values: Tensor) -> None:
        """Merges a batch (B, C, T) into the k best of each channel."""
        rows, channels, _ = values.shape
        if self.per_sample == 1:
            best, where = values.max(-1, keepdim=True)
        else:
            best, where = (part[..., : self.per_sample] for part in values.sort(dim=-1, descending=True, stable=True))
        sample = torch.arange(self._seen, self._seen + rows, device=values.device)[:, None, None].expand_as(best)
        if self.threshold is not None:
            best = best.masked_fill(best < self.threshold, -torch.inf)
        new = tuple(part.transpose(0, 1).reshape(channels, -1) for part in (best, sample, where))
        if self._best is not None:
            new = tuple(torch.cat([old, part], 1) for old, part in zip(self._best, new, strict=True))
        order = new[0].sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self._best = tuple(part.gather(1, order) for part in new)

    def table(self) -> Table:
        """Returns the hits."""
        if self._best is None or self._layer is None:
            raise InvalidValue("data holds no batches. Pass data again: a generator is empty once it was read.")
        hits = [
            Hit(sample, channel, *self._layer.span(frame), value, frame, self._rank, self.time_dim)
            for channel, *best in zip(self._numbers, *(part.tolist() for part in self._best), strict=True)
            for value, sample, frame in zip(*best, strict=True)
            if value != -torch.inf
        ]
        columns = ("sample", "channel", "start", "stop", "value")
        rows = [tuple(getattr(hit, name) for name in columns) for hit in hits]
        title, notes = ("", []) if hits else ("no hits", [f"{self._seen} inputs searched"])
        return Table(columns, rows, title, notes, hits)


def _positive(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidType(f"{name} is a {type(value).__name__}, and it must be an int such as 10.") from None
    if isinstance(value, bool) or number < 1:
        raise InvalidValue(f"{name}={value!r}, and it must be at least 1.")
    return number


def _iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise InvalidType(
            f"data is a {type(data).__name__}, which gives single inputs. Pass batches: DataLoader(data, batch_size=32)."
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise InvalidType(f"data is a {type(data).__name__}. Pass a DataLoader, an iterable of batches, or one tensor.")
    return data


def _chosen(channels: Any, count: int, name: str) -> list[int]:
    """Reads which channels are asked for."""
    if channels is None:
        return list(range(count))
    try:
        numbers = [operator.index(one) for one in (channels if isinstance(channels, Iterable) else [channels])]
    except TypeError:
        raise InvalidType(f"channels is {brief(channels)}. Pass an int or several: channels=[0, 3].") from None
    for number in numbers:
        if not -count <= number < count:
            raise OutOfRange(f"there is no channel {number}: {name!r} has {count}, numbered 0 to {count - 1}.")
    if not numbers:
        raise InvalidValue("channels is empty, so nothing would be searched. Leave it out for all channels.")
    return [number % count for number in numbers]
