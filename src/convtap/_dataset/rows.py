"""Turns the outputs of one forward pass into rows, one for each sample."""

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

#: (layer, path of the part that was kept, value) of each call of one forward pass, in execution order.
Calls = list[tuple[str, str, Any]]


@dataclass(frozen=True)
class RowMaker:
    """How calls become rows.

    Attributes:
        options: those of the extraction; ``reduce`` and ``dtype`` are for rows that are cut, others have them already.
        rule: the rule for valid frames; None to leave rows whole.
        axes: which axis of an output is time, and the notes of that for the rows.
    """

    options: ExtractOptions
    rule: ValidLengths | None
    axes: RowAxes

    def columns(self, calls: Calls, size: int) -> dict[str, Rows]:
        """Turns the calls of one forward pass into rows by key, on the CPU.

        Args:
            size: the number of samples in the batch.

        Raises:
            Unsupported: a layer ran several times, or its rows are not the samples.
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
        """Yields key, layer, part, path in that and tensor of everything that is to be stored."""
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
                    f"layer {key!r}: reduce failed on a row of shape {tuple(row.shape)}: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(reduced, Tensor):
                raise InvalidType(
                    f"reduce returned a {type(reduced).__name__}, and it must return a tensor. With lengths= it is given "
                    "one sample (C, T): reduce=lambda t: t.mean(-1)."
                )
            row, axes = reduced, after(axes, row.shape, reduced.shape)
        self.axes.note(key, axes)
        try:
            row = cast(row, self.options.dtype)
        except InvalidValue as error:
            raise InvalidValue(f"layer {key!r}: {error}") from None
        # its own memory: a part of the batch would keep all of it alive
        return row.detach().to("cpu", copy=True).contiguous()


def _stacked(rows: list[Tensor]) -> Rows:
    """Puts rows of one shape into one tensor: thousands of small ones would weigh more than their numbers."""
    if rows and all(row.shape == rows[0].shape and row.dtype == rows[0].dtype for row in rows):
        return torch.stack(rows)
    return rows


def _own(tensor: Tensor) -> Tensor:
    """Brings rows to the CPU; a part of a larger storage gets its own, or it would keep all of that alive."""
    if tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized:
        return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
    return tensor.to("cpu")


def _joined(layer: str, values: list[Any], dim: int) -> Iterable[tuple[str, Tensor]]:
    if len(values) == 1:
        return _leaves(layer, values[0])
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(values):
        raise Unsupported(
            f"layer {layer!r} gives no single tensor, so calls='cat' cannot join its calls: calls='keys'."
        )
    try:
        return [("", torch.cat(tensors, dim))]
    except RuntimeError as error:
        shapes = listed([str(tuple(tensor.shape)) for tensor in tensors])
        raise Unsupported(
            f"the calls of layer {layer!r} have shapes {shapes}, which cannot be joined on time: calls='keys'."
        ) from error


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an output, each with its path: ``[0]``, ``[1][0]``; ``key`` is of the whole."""
    for path, leaf in walk_leaves(value):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            kind = leaf.kind if isinstance(leaf, Omitted) else type(leaf).__name__
            raise Unsupported(
                f"the output {key + path!r} is a {kind}, no tensor, and a store holds tensors. Leave the layer out of the "
                "selection, select the parts of it that are tensors, or select the layers inside it."
            )
        yield path, leaf


def _check_rows(key: str, tensor: Tensor, size: int, batch: int) -> None:
    if tensor.dim() and tensor.shape[batch] == size:
        return
    axis = f"axis {batch} is {tensor.shape[batch]}" if tensor.dim() else "it has no axis"
    raise Unsupported(
        f"layer {key!r} gives shape {tuple(tensor.shape)}: {axis} and the batch has {size} samples, so its rows are not the "
        "samples. Leave the layer out, bring the samples to axis 0 with reduce=, or, if the model really has other rows than "
        "the data, give ids=."
    )
