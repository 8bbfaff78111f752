"""Turns the outputs of a forward pass into rows, one for each sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.options import ExtractOptions
from convtap._dataset.shard_format import Rows
from convtap._dataset.time_axes import RowAxes
from convtap._dataset.valid_lengths import ValidLengths
from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported, listed
from convtap._record.policy import cast
from convtap._result.keys import numbered, separator, stems
from convtap._tensors.layout import Axes, after
from convtap._tensors.nested import Omitted, walk_leaves

#: (layer, path of the kept part, value) of each call of one forward pass, in execution order.
Calls = list[tuple[str, str, Any]]


@dataclass(frozen=True)
class RowMaker:
    """Turns calls into rows.

    Attributes:
        options: the options of the extraction. ``reduce`` and ``dtype`` apply only to cut rows; the capture applied them to
            others.
        rule: the rule for valid frames; None to keep whole rows.
        axes: finds the time axis of an output, and notes it for the rows.
    """

    options: ExtractOptions
    rule: ValidLengths | None
    axes: RowAxes

    def columns(self, calls: Calls, size: int) -> dict[str, Rows]:
        """Returns the rows of one forward pass by key, on the CPU.

        Args:
            size: the number of samples in the batch.

        Raises:
            Unsupported: a layer ran several times, or the rows of its output are not the samples.
        """
        columns: dict[str, Rows] = {}
        for key, layer, part, path, tensor in self._tensors(calls):
            if key in columns:
                raise Unsupported(
                    f"two outputs would both be stored as {key!r}. Rename a layer, or select one of them."
                )
            axes = self.axes.of(layer, part, path, tensor.shape)
            _check_rows(key, tensor, size, axes.batch)
            if self.rule is None:
                columns[key] = _own(tensor.detach().movedim(axes.batch, 0))
                self.axes.note(key, axes)
                continue
            rows = self.rule.cut(layer, part + path, tensor, axes.batch)
            rows = list(tensor.movedim(axes.batch, 0)) if rows is None else rows
            columns[key] = _stacked([self._kept(key, layer + part, row, axes) for row in rows])
        return columns

    def _tensors(self, calls: Calls) -> Iterator[tuple[str, str, str, str, Tensor]]:
        """Yields the key, layer, part, path in the part and value of each tensor to store."""
        by_layer: dict[tuple[str, str], list[Any]] = {}
        for layer, part, value in calls:
            by_layer.setdefault((layer, part), []).append(value)
        names = {layer for layer, _ in by_layer}
        taken = stems(names)
        marks = {layer: separator(layer, taken) for layer in names}
        for (layer, part), values in by_layer.items():
            if self.options.calls == "keys":
                for number, value in enumerate(values):
                    key = numbered(layer, number, 0, marks[layer], part)
                    yield from ((key + path, layer, part, path, tensor) for path, tensor in _leaves(key, value))
                continue
            if len(values) > 1 and self.options.calls == "error":
                raise Unsupported(
                    f"layer {layer + part!r} ran {len(values)} times in one forward pass. Pass calls='cat' to join its calls "
                    "on time, or calls='keys' to store each under its own key."
                )
            key = layer + part
            shape = next((value.shape for value in values if isinstance(value, Tensor)), ())
            axes = self.axes.of(layer, part, "", shape)
            dim = -1 if axes.time is None else axes.time - axes.batch
            yield from ((key + path, layer, part, path, tensor) for path, tensor in _joined(key, values, dim))

    def _kept(self, key: str, name: str, row: Tensor, axes: Axes) -> Tensor:
        reduce = self.options.reductions.of(name)
        if reduce is not None:
            try:
                reduced = reduce(row)
            except Exception as error:
                raise ConvtapError(
                    f"layer {key!r}: reduce failed on a row of shape {tuple(row.shape)}: {type(error).__name__}: {error}. "
                    "With lengths= its argument is one sample, without the batch axis: reduce=lambda t: t.mean(-1)."
                ) from error
            if not isinstance(reduced, Tensor):
                raise InvalidType(
                    f"reduce returned a {type(reduced).__name__}, not a tensor. With lengths= its argument is one sample "
                    "(C, T): reduce=lambda t: t.mean(-1)."
                )
            row, axes = reduced, after(axes, row.shape, reduced.shape)
        self.axes.note(key, axes)
        try:
            row = cast(row, self.options.dtype)
        except InvalidValue as error:
            raise InvalidValue(f"layer {key!r}: {error}") from None
        # a copy, since a view would keep the whole batch alive
        return row.detach().to("cpu", copy=True).contiguous()


def _stacked(rows: list[Tensor]) -> Rows:
    """Stacks rows of one shape, since many small tensors take more memory."""
    if rows and all(row.shape == rows[0].shape and row.dtype == rows[0].dtype for row in rows):
        return torch.stack(rows)
    return rows


def _own(tensor: Tensor) -> Tensor:
    """Moves rows to the CPU, and copies a view, which would keep its storage alive."""
    if tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized:
        return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
    return tensor.to("cpu")


def _joined(layer: str, values: list[Any], dim: int) -> Iterable[tuple[str, Tensor]]:
    if len(values) == 1:
        return _leaves(layer, values[0])
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(values):
        raise Unsupported(
            f"layer {layer!r} returns a structure, so calls='cat' cannot join its calls. Pass calls='keys'."
        )
    try:
        return [("", torch.cat(tensors, dim))]
    except RuntimeError as error:
        shapes = listed([str(tuple(tensor.shape)) for tensor in tensors])
        raise Unsupported(
            f"the calls of layer {layer!r} have shapes {shapes}, which cannot be joined on time. Pass calls='keys'."
        ) from error


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the path, such as ``[1][0]``, and value of each tensor of an output."""
    for path, leaf in walk_leaves(value):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            kind = leaf.kind if isinstance(leaf, Omitted) else type(leaf).__name__
            raise Unsupported(
                f"the output {key + path!r} is a {kind}, but a store holds tensors. Deselect the layer, select the parts of "
                f"its output that are tensors (layers='{key}[0]'), or select the layers inside it."
            )
        yield path, leaf


def _check_rows(key: str, tensor: Tensor, size: int, batch: int) -> None:
    if tensor.dim() and tensor.shape[batch] == size:
        return
    axis = f"axis {batch} of {tuple(tensor.shape)} is {tensor.shape[batch]}" if tensor.dim() else "it has no axis"
    raise Unsupported(
        f"the rows of layer {key!r} are not the samples: {axis}, but the batch has {size} samples. Deselect the layer, move "
        "the samples to axis 0 with reduce=, or, if the model's rows really differ from the data's, pass ids=."
    )
