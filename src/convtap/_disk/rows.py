"""From what one forward pass gave to rows, one for each sample: names, counts, valid frames, reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convtap._disk.axes import RowAxes
from convtap._disk.chain import ValidLengths
from convtap._disk.shards import Rows
from convtap._errors import ConvtapError, InvalidType, Unsupported, listed
from convtap._layout import Axes, after
from convtap._structure import Omitted

#: (layer, number of the call, value) of each call of one forward pass, in execution order.
Calls = list[tuple[str, int, Any]]


@dataclass(frozen=True)
class RowMaker:
    """How calls become rows.

    Attributes:
        calls: ``"error"``, ``"cat"`` or ``"keys"``: what to do with a layer that ran several times.
        rule: the rule for valid frames; None to leave rows whole.
        reduce: for rows that are cut; without a rule the batch was reduced already.
        dtype: what to cast rows to that are cut.
        axes: which axis of an output is time, and what is noted of that for the rows.
    """

    calls: str
    rule: ValidLengths | None
    reduce: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype | None
    axes: RowAxes

    def columns(self, calls: Calls, size: int, lengths: list[int] | None, full: int) -> dict[str, Rows]:
        """Turns the calls of one forward pass into rows by key, on the CPU.

        Args:
            size: the number of samples in the batch.
            lengths: each sample's input length, if rows are to be cut.
            full: the length of the padded input.

        Raises:
            Unsupported: a layer ran several times, or gave no rows that are samples.
        """
        columns: dict[str, Rows] = {}
        for key, layer, tensor in self._tensors(calls):
            if key in columns:
                raise Unsupported(
                    f"two outputs would both be stored as {key!r}. Rename a layer, or select one of them."
                )
            axes = self.axes.of(layer, _path(key), tensor.shape)
            _check_rows(key, tensor, size, axes.batch)
            tensor = tensor.movedim(axes.batch, 0)
            if self.rule is None or lengths is None:
                columns[key] = _own(tensor.detach())
                self.axes.note(key, axes)
            else:
                if axes.time is None:
                    raise Unsupported(
                        f"layer {key!r} gives shape {tuple(tensor.shape)}, which has no time axis to cut."
                    )
                self.rule.check(layer, full, tensor.shape[axes.time])
                frames = [self.rule.frames(layer, length) for length in lengths]
                columns[key] = _stacked(
                    [self._cut(key, row.narrow(axes.time, 0, n), axes) for row, n in zip(tensor, frames, strict=True)]
                )
        return columns

    def _tensors(self, calls: Calls) -> Iterator[tuple[str, str, Tensor]]:
        """Yields key, layer and tensor of everything that is to be stored."""
        by_layer: dict[str, list[Any]] = {}
        for layer, _, value in calls:
            by_layer.setdefault(layer, []).append(value)
        for layer, values in by_layer.items():
            if self.calls == "keys":
                for number, value in enumerate(values):
                    yield from ((key, layer, tensor) for key, tensor in _leaves(f"{layer}#{number}", value))
                continue
            if len(values) > 1 and self.calls == "error":
                raise Unsupported(
                    f"layer {layer!r} ran {len(values)} times in one forward pass. Pass calls='cat' to join its calls on "
                    "time, or calls='keys' to store each under its own key."
                )
            shape = next((value.shape for value in values if isinstance(value, Tensor)), ())
            axes = self.axes.of(layer, "", shape)
            dim = -1 if axes.time is None else axes.time - axes.batch
            yield from ((key, layer, tensor) for key, tensor in _joined(layer, values, dim))

    def _cut(self, key: str, row: Tensor, axes: Axes) -> Tensor:
        before = row.shape
        if self.reduce is not None:
            try:
                reduced = self.reduce(row)
            except Exception as error:
                raise ConvtapError(
                    f"layer {key!r}: reduce failed on a row of shape {tuple(row.shape)}: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(reduced, Tensor):
                raise InvalidType(
                    f"reduce returned a {type(reduced).__name__}, and it must return a tensor. With lengths= it is given "
                    "one sample (C, T): reduce=lambda t: t.mean(-1)."
                )
            row = reduced
            axes = after(axes, before, row.shape)
        self.axes.note(key, axes)
        if self.dtype is not None and (row.is_floating_point() or row.is_complex()):
            row = row.to(self.dtype)
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
        return [(layer, torch.cat(tensors, dim))]
    except RuntimeError as error:
        shapes = listed([str(tuple(tensor.shape)) for tensor in tensors])
        raise Unsupported(
            f"the calls of layer {layer!r} have shapes {shapes}, which cannot be joined on time: calls='keys'."
        ) from error


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an output under the names that keep its structure: ``lstm[0]``, ``lstm[1][0]``."""
    if value is None:
        return
    if isinstance(value, Tensor):
        yield key, value
        return
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, (tuple, list)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif hasattr(value, "items"):
        items = value.items()
    elif hasattr(value, "__dataclass_fields__"):
        items = ((name, getattr(value, name)) for name in value.__dataclass_fields__)
    else:
        kind = value.kind if isinstance(value, Omitted) else type(value).__name__
        raise Unsupported(
            f"the output {key!r} is a {kind}, no tensor, and a store holds tensors. Leave the layer out of the selection, or "
            "select the layers inside it."
        )
    for name, item in items:
        yield from _leaves(f"{key}[{name}]", item)


def _path(key: str) -> str:
    """The place of a tensor in a layer's output, from its key: ``"1.0"`` of ``lstm[1][0]``."""
    return ".".join(part.rstrip("]") for part in key.split("[")[1:])


def _check_rows(key: str, tensor: Tensor, size: int, batch: int) -> None:
    if tensor.dim() and tensor.shape[batch] == size:
        return
    axis = f"axis {batch} is {tensor.shape[batch]}" if tensor.dim() else "it has no axis"
    raise Unsupported(
        f"layer {key!r} gives shape {tuple(tensor.shape)}: {axis} and the batch has {size} samples, so its rows are not the "
        "samples. Leave the layer out, bring the samples to axis 0 with reduce=, or, if the model really has other rows than "
        "the data, give ids=."
    )


def values_of(calls: Iterable[Any]) -> Calls:
    """Reads the calls of a block, in execution order."""
    return [(call.name, call.index, call.output) for call in calls]
