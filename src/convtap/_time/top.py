"""Which input windows drive a layer's channels most, over a whole data set: ``top(model, data, layer, k)``."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
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
        raise InvalidType(
            f"layer is a {type(layer).__name__}, and it must be one layer's name, such as 'encoder.conv1'."
        )
    search = _Search(model, layer, k, channels, per_sample, threshold, example, time_dim, inputs)
    batches: Iterable[Any] = [data] if isinstance(data, Tensor) or is_array(data) else _iterable(data)
    with looking(model):
        for batch in batches:
            search.add(batch)
    return search.table()


class _Search:
    """The best frames so far, and what they are searched with."""

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        k: int,
        channels: int | Sequence[int] | None,
        per_sample: int,
        threshold: float | None,
        example: Any,
        time_dim: int,
        inputs: Inputs | None = None,
    ) -> None:
        self._model = model
        self._device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
        self._name = layer
        self._k = k
        self._channels = channels
        self._per_sample = per_sample
        self._threshold = threshold
        self._example = example
        self._time_dim = time_dim
        self._inputs = inputs
        self._layer: LayerTime | None = None
        self._best: tuple[Tensor, Tensor, Tensor] | None = None
        self._numbers: list[int] = []
        self._seen = 0
        self._rank = 2

    def add(self, batch: Any) -> None:
        """Runs one batch and keeps the best of it and of what there was."""
        args, kwargs = called_with(self._inputs, batch, self._model)
        with naming_inputs(self._inputs, batch, self._model):
            self._add(args, kwargs)

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = own_tensors(moved(as_example(self._model, args, kwargs), self._device))
        signal = signal_of(call)[1]
        if self._layer is None:
            example = _first(call) if self._example is None else self._example
            times = timeline(self._model, example, time_dim=self._time_dim)
            self._layer, self._time_dim = (
                times[self._name],
                times.time_dim,
            )  # counted from the end: inputs have no batch
            self._rank = signal.dim() - 1
        values = self._values(self._layer, call, signal)
        if self._best is None:
            self._numbers = _chosen(self._channels, values.shape[1], self._name)
        if values.shape[1] <= max(self._numbers):
            raise Unsupported(
                f"{self._name!r} had {max(self._numbers) + 1} channels or more, and now {values.shape[1]}."
            )
        self._keep(values[:, self._numbers])
        self._seen += len(values)

    def _values(self, layer: LayerTime, call: Any, signal: Tensor) -> Tensor:
        """The layer's output as (B, C, T)."""
        samples = int(signal.shape[self._time_dim])
        if samples != layer.input_length and (layer.whole or layer.notes):
            raise Unsupported(
                f"{layer.key!r} sees windows that hold for {layer.input_length} samples only "
                f"({listed([*layer.whole, *layer.notes], 2)}), and an input has {samples}. Pass inputs of one length."
            )
        with Capture(self._model, layer.name, functional=True) as acts:  # whole passes: a model may keep state
            called(self._model, call)
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
        output = output.movedim(layer.dim, -1).reshape(rows, -1, frames)
        output = real_values(output)  # of complex numbers the magnitudes, as in pictures and statistics
        if bool(output.isnan().any()):
            row = int(output.isnan().flatten(1).any(1).nonzero()[0])
            raise NonFiniteOutput(f"{layer.key!r} gives NaN for input {self._seen + row}, so nothing is highest there.")
        return output

    def _keep(self, values: Tensor) -> None:
        """Merges a batch (B, C, T) into the k best of each channel."""
        rows, channels, frames = values.shape
        count = min(self._per_sample, frames)
        if count == 1:
            best, where = values.max(-1, keepdim=True)
        else:
            ordered, order = values.sort(dim=-1, descending=True, stable=True)
            best, where = ordered[..., :count], order[..., :count]
        sample = torch.arange(self._seen, self._seen + rows, device=values.device)[:, None, None].expand_as(best)
        new = tuple(part.transpose(0, 1).reshape(channels, -1) for part in (best, sample, where))
        if self._threshold is not None:
            new = (new[0].masked_fill(new[0] < self._threshold, -torch.inf), *new[1:])
        if self._best is not None:
            new = tuple(torch.cat([old, part], 1) for old, part in zip(self._best, new, strict=True))
        order = new[0].sort(dim=1, descending=True, stable=True).indices[:, : self._k]
        self._best = (new[0].gather(1, order), new[1].gather(1, order), new[2].gather(1, order))

    def table(self) -> Table:
        """Returns the hits."""
        if self._best is None or self._layer is None:
            raise InvalidValue(
                "data holds no batches, so there is nothing to search. (A generator is empty once it was read.)"
            )
        hits: list[Hit] = []
        lists = [part.tolist() for part in self._best]
        for channel, *rows in zip(self._numbers, *lists, strict=True):
            for value, sample, frame in zip(*rows, strict=True):
                if value != -torch.inf:
                    start, stop = self._layer.span(frame)
                    hits.append(Hit(sample, channel, start, stop, value, frame, self._rank, self._time_dim))
        columns = ("sample", "channel", "start", "stop", "value")
        rows_ = [tuple(getattr(hit, name) for name in columns) for hit in hits]
        notes = [f"{self._seen} inputs searched"] if not hits else []
        return Table(columns, rows_, title="" if hits else "no hits", notes=notes, items=hits)


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
            f"data is a {type(data).__name__}, which gives single inputs. Pass batches: "
            "DataLoader(data, batch_size=32)."
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise InvalidType(f"data is a {type(data).__name__}. Pass a DataLoader, an iterable of batches, or one tensor.")
    return data


def _first(args: Any) -> Any:
    """The first input of a batch, as an example."""
    rows = len(signal_of(args)[1])

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    return {key: cut(value) for key, value in args.items()} if isinstance(args, dict) else tuple(map(cut, args))


def _chosen(channels: Any, count: int, name: str) -> list[int]:
    """Reads which channels are asked for."""
    if channels is None:
        return list(range(count))
    try:
        numbers = [operator.index(one) for one in (channels if isinstance(channels, Iterable) else [channels])]
    except TypeError:
        raise InvalidType(
            f"channels is {brief(channels)}, and it must be an int or several: channels=[0, 3]."
        ) from None
    for number in numbers:
        if not -count <= number < count:
            raise OutOfRange(f"there is no channel {number}: {name!r} has {count}, numbered 0 to {count - 1}.")
    if not numbers:
        raise InvalidValue("channels is empty, so nothing would be searched. Leave it out for all channels.")
    return [number % count for number in numbers]
