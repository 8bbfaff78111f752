"""The public ``top``, which finds the input windows with the highest outputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

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
from convtap._time.hit import Hit
from convtap._time.layer_time import LayerTime
from convtap._time.signal import signal_of
from convtap._time.timeline import timeline


@public
def top(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    layer: str,
    k: int,
    *,
    inputs: Inputs | None = None,
    channels: int | Sequence[int] | None = None,
    per_sample: int | None = None,
    min_distance: int | None = None,
    threshold: float | None = None,
    example: Example | None = None,
    time_dim: int = -1,
) -> Table:
    """Finds the input windows of a data set that excite each channel of a layer most.

    They are the windows of the k highest values of each channel. ``top`` makes one pass over the data, in eval mode and
    without gradients, and keeps only k values per channel. Of equal values it keeps the earlier one. The model does not
    change: state that the pass changes, such as the caches of a streaming model, is restored at the end.

    Args:
        model: any PyTorch model.
        data: batches, as a ``DataLoader`` or any iterable yields them, or one batch as a tensor or array.
        layer: the layer's name.
        k: the number of hits per channel.
        inputs: a function that turns a batch into ``(args, kwargs)`` for the model. By default, a tensor or array is passed
            as it is, a mapping as keyword arguments, and of a tuple or list, such as (x, labels), the first element.
        channels: the channels to search; None for all.
        per_sample: the maximum number of hits of a channel in one input. None means 1 (neighbouring frames see nearly the
            same window), or k with ``min_distance``.
        min_distance: the minimum distance, in input samples, between the centres of two hits of a channel in one input. Of
            closer hits, only the highest is kept (non-maximum suppression). None for no limit.
        threshold: the minimum value of a hit; None for no limit.
        example: the example to make the timeline with; None for the first input of the data.
        time_dim: the axis of the input that is time, as in ``timeline``.

    Returns:
        A table of ``Hit``, by channel and then from the highest value down.

    Raises:
        LayerNotFound: the model has no such layer.
        AmbiguousCall: the layer runs several times (``name#1`` is one of its runs).
        Unsupported: the layer's time axis is unknown or was reduced, or the rows of its output are not the inputs.
        NonFiniteOutput: the layer produced NaN.
        OutOfRange: the layer has no such channel.
        InvalidType: the model does not accept a batch as it is passed by default, or an argument has the wrong type.
        InvalidValue: the data has no batches, or a number is out of its range.

    Examples:
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
    k, apart = _positive(k, "k"), _distance(min_distance)
    each = (1 if apart is None else k) if per_sample is None else _positive(per_sample, "per_sample")
    if not isinstance(layer, str):
        raise InvalidType(f"layer is a {type(layer).__name__}. Pass one layer's name, such as 'encoder.conv1'.")
    search = _Search(model, layer, k, channels, each, threshold, example, time_dim, inputs, apart)
    batches: Iterable[Any] = [data] if isinstance(data, Tensor) or is_array(data) else _iterable(data)
    with looking(model):
        for batch in batches:
            search.add(batch)
    return search.table()


@dataclass
class _Search:
    """The settings of a search and the best frames so far."""

    model: nn.Module
    name: str
    k: int
    channels: int | Sequence[int] | None
    per_sample: int
    threshold: float | None
    example: Any
    time_dim: int
    inputs: Inputs | None = None
    min_distance: int | None = None
    _layer: LayerTime | None = None
    _best: tuple[Tensor, ...] | None = None
    _numbers: Sequence[int] = ()
    _seen: int = 0
    _rank: int = 2

    def add(self, batch: Any) -> None:
        """Runs one batch and updates the best frames."""
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
            raise Unsupported(
                f"{self.name!r} had {max(self._numbers) + 1} channels or more before, and now has {channels}. Pass only "
                f"channels that it always has: channels=range({channels})."
            )
        self._keep(values[:, self._numbers])
        self._seen += len(values)

    def _found(self, call: Any) -> LayerTime:
        """Makes the timeline, by default with the first input of a batch."""
        signal = signal_of(call)[1]

        def cut(value: Any) -> Any:
            return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == len(signal) else value

        first = {key: cut(value) for key, value in call.items()} if isinstance(call, dict) else tuple(map(cut, call))
        times = timeline(self.model, first if self.example is None else self.example, time_dim=self.time_dim)
        # counted from the end, since one input has no batch axis
        self._layer, self.time_dim, self._rank = times[self.name], times.time_dim, signal.dim() - 1
        return self._layer

    def _values(self, layer: LayerTime, call: Any) -> Tensor:
        """Returns the layer's output as (B, C, T)."""
        signal = signal_of(call)[1]
        samples = int(signal.shape[self.time_dim])
        if samples != layer.input_length and (layer.whole or layer.notes):
            raise Unsupported(
                f"the windows of {layer.key!r} hold for inputs of {layer.input_length} samples only "
                f"({listed([*layer.whole, *layer.notes], 2)}), but an input has {samples}. Pass inputs of one length."
            )
        with Capture(self.model, layer.name, functional=True) as acts:  # whole passes: a model may keep state
            called(self.model, call)
        output = dict(walk_tensors(acts[layer.key]))[layer.path]
        rows, frames = len(signal), layer.frames_of(samples)
        assert layer.dim is not None
        inputs = 1 if layer.is_time_first else 0
        if output.dim() < 2 or output.shape[inputs] != rows or output.shape[layer.dim] != frames:
            raise Unsupported(
                f"{layer.key!r} has shape {tuple(output.shape)} for {plural(rows, 'input')} of {samples} samples, but by "
                f"the timeline axis {inputs} is the inputs and axis {layer.dim} has {frames} frames. "
                "Pass an example that is as long as the data: example=x."
            )
        # of complex numbers the magnitudes, as in pictures and statistics
        output = real_values(output.movedim(layer.dim, -1).reshape(rows, -1, frames))
        if bool(output.isnan().any()):
            row = int(output.isnan().flatten(1).any(1).nonzero()[0])
            raise NonFiniteOutput(
                f"{layer.key!r} produced NaN for input {self._seen + row}. Find the cause: with finite(model): model(x)."
            )
        return output

    def _highest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the highest values (B, C, hits) that may be hits, and their frames."""
        if self.per_sample == 1:
            best, where = values.max(-1, keepdim=True)
            return best, where
        close = self._close()
        if close:
            return _peaks(values, min(self.per_sample, self.k), close)
        best, where = values.sort(dim=-1, descending=True, stable=True)
        return best[..., : self.per_sample], where[..., : self.per_sample]

    def _close(self) -> int:
        """Returns how many frames on each side of a hit are too close to it."""
        if self.min_distance is None or self._layer is None:
            return 0
        return math.ceil(Fraction(self.min_distance) / self._layer.stride) - 1

    def _keep(self, values: Tensor) -> None:
        """Merges a batch (B, C, T) into the k best of each channel."""
        rows, channels, _ = values.shape
        best, where = self._highest(values)
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
            raise InvalidValue("data holds no batches. Pass a new iterable, since a generator is empty after one pass.")
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


def _peaks(values: Tensor, count: int, close: int) -> tuple[Tensor, Tensor]:
    """Returns the highest values of (B, C, T) and their frames.

    Any two of the frames are more than ``close`` frames apart.
    """
    frames = values.shape[-1]
    close = min(close, frames - 1)
    left, around = values.clone(), torch.arange(-close, close + 1, device=values.device)
    found = []
    for _ in range(min(count, -(-frames // (close + 1)))):
        best, where = left.max(-1, keepdim=True)
        found.append((best, where))
        left.scatter_(-1, (where + around).clamp(0, frames - 1), -torch.inf)
    best, where = (torch.cat(part, -1) for part in zip(*found, strict=True))
    return best, where


def _positive(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidType(f"{name} is a {type(value).__name__}. Pass an int: {name}=10.") from None
    if isinstance(value, bool) or number < 1:
        raise InvalidValue(f"{name}={value!r} is not a positive int. Pass at least 1: {name}=10.")
    return number


def _distance(value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidType(
            f"min_distance is a {type(value).__name__}. Pass a whole number of input samples, such as min_distance=100."
        ) from None
    if isinstance(value, bool) or number < 1:
        raise InvalidValue(
            f"min_distance={value!r} is not a positive int. Pass at least 1 input sample, or remove min_distance=."
        )
    return number


def _iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise InvalidType(
            f"data is a {type(data).__name__}, which yields single inputs. Pass batches: DataLoader(data, batch_size=32)."
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise InvalidType(f"data is a {type(data).__name__}. Pass a DataLoader, an iterable of batches, or one tensor.")
    return data


def _chosen(channels: Any, count: int, name: str) -> list[int]:
    """Returns the numbers of the channels to search."""
    if channels is None:
        return list(range(count))
    try:
        numbers = [operator.index(one) for one in (channels if isinstance(channels, Iterable) else [channels])]
    except TypeError:
        raise InvalidType(f"channels is {brief(channels)}. Pass an int or several: channels=[0, 3].") from None
    for number in numbers:
        if not -count <= number < count:
            raise OutOfRange(
                f"channel {number} does not exist in {name!r}, which has {count}. Pass numbers from 0 to {count - 1}."
            )
    if not numbers:
        raise InvalidValue("channels is empty. Pass at least one, or remove channels= to search all of them.")
    return [number % count for number in numbers]
