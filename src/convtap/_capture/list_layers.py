"""The public function ``list_layers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convtap._capture.options import capture_options
from convtap._capture.session import Session
from convtap._capture.size_estimate import SizeEstimator, estimated_bytes
from convtap._errors import LayerNotFound
from convtap._public import public
from convtap._record.reductions import Reduce
from convtap._result.activations import Activations
from convtap._result.call import Call
from convtap._result.log import Log
from convtap._result.samples import Samples
from convtap._select.arguments import as_selection, check_arguments
from convtap._select.example import Example, called, entry, looking, own_tensors, prepared
from convtap._select.selection import CONV1D, Layers, Types, select
from convtap._spelling import printable_repr
from convtap._table import Rows, Table, human_bytes
from convtap._tensors.statistics import dtype_text, shapes_text


@public
@printable_repr
@dataclass(frozen=True)
class LayerRow:
    """One layer of a selection.

    Attributes:
        name: the qualified name.
        type: the class of the module, or ``"parameter"`` for a convolution without one.
        parameters: the number of its own parameters, or None if they are not materialized yet.
        kernel: the kernel size, as an int for one axis, or None if the type has no kernel.
        stride: the stride, likewise.
        dilation: the dilation, likewise.
        used: with an example, how it ran, such as ``"module × 2"``, ``"F.conv1d × 1"`` or ``"idle"``.
        shape: with an example, the shape that a capture would keep of its first call, such as (B, C, T).
        dtype: with an example, the data type of that value.
        nbytes: with an example, the bytes that a capture would keep of all its calls. Memory that it shares with an earlier
            layer counts for that layer.
        nbytes_per_sample: with an example, the bytes for each input of the batch.
    """

    name: str
    type: str
    parameters: int | None
    kernel: Any = None
    stride: Any = None
    dilation: Any = None
    used: str | None = None
    shape: Any = None
    dtype: torch.dtype | None = None
    nbytes: int | None = None
    nbytes_per_sample: float | None = None


@public
def list_layers(
    model: nn.Module,
    layers: Layers = None,
    *,
    types: Types = CONV1D,
    example: Example | None = None,
    method: str | None = None,
    reduce: Reduce | None = None,
    dtype: torch.dtype | None = None,
) -> Table:
    """Lists the selected layers of a model, in definition order.

    Print the table, or iterate over its rows. With an example, the model runs once, in eval mode and without gradients. Each
    row then shows how the layer is used, and the bytes that a capture with ``reduce`` and ``dtype`` would keep, in total and
    for each input. ``list_layers`` keeps no outputs, and restores the model's caches and statistics and the random numbers.

    Args:
        model: any PyTorch model.
        layers: the layers to list, as in ``capture``; None for every 1-D convolution.
        types: the module types that selectors choose from.
        example: a tensor or array, a tuple of positional arguments, or a mapping of keyword arguments.
        method: the name of the method to run on the example, such as ``"encode"``; None to call the model itself.
        reduce: as in ``capture``.
        dtype: as in ``capture``.

    Raises:
        LayerNotFound: a selector matches no layer.
        InvalidType: the model does not take the example.
        InvalidValue: the model has no such method.

    Examples:
        >>> from torch import nn
        >>> from convtap import list_layers
        >>> list_layers(nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 5, stride=2)))
        layer  type    parameters  kernel  stride  dilation
        -----  ------  ----------  ------  ------  --------
        0      Conv1d          16       3       1         1
        2      Conv1d         168       5       2         1
    """
    layers = as_selection(layers)
    kinds = check_arguments(model, layers, types, "to run the model once: list_layers(model, example=x)")
    selection = select(model, layers, kinds)
    entry(model, method)
    rows = {name: _row(name, module) for name, module in selection.names.items() if module is not None}
    if example is None:
        if not rows and not selection.function_names:
            raise LayerNotFound(selection.nothing())
        return _table(list(rows.values()), ("parameters", "kernel", "stride", "dilation"))
    log = _observe(model, layers, kinds, example, method, reduce, dtype)
    acts, batch = Activations(log), Samples(log).count
    used = [
        _with_use(rows.get(name) or LayerRow(name, "parameter", None), acts.calls(name), str(state), batch)
        for name, state in acts.coverage.items()
    ]
    return _table(used, ("used", "shape", "dtype", "bytes", "per sample"), _forecast(used, batch))


def _observe(model: Any, layers: Any, types: Any, example: Any, method: Any, reduce: Any, dtype: Any) -> Log:
    example = own_tensors(prepared(example, model))
    options = capture_options(model, layers, types=types, functional=True)
    with looking(model), Session(options.without_checks(SizeEstimator(reduce=reduce, dtype=dtype))) as session:
        called(model, example, method)
    return session.log


#: The attributes for kernel size, stride and dilation in PyTorch and in Keras.
_GEOMETRY = (("kernel_size", "kernel_size"), ("stride", "strides"), ("dilation", "dilation_rate"))


def _row(name: str, module: nn.Module) -> LayerRow:
    own = list(module.parameters())
    lazy = any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in own)
    return LayerRow(
        name,
        f"{module.original_name} (TorchScript)"
        if isinstance(module, torch.jit.ScriptModule)
        else type(module).__name__,
        None if lazy else sum(parameter.numel() for parameter in own),
        *(_single(getattr(module, key, getattr(module, keras, None))) for key, keras in _GEOMETRY),
    )


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _with_use(row: LayerRow, calls: list[Call], state: str, batch: int) -> LayerRow:
    if not calls:
        return LayerRow(**{**row.__dict__, "used": state})
    ways = {
        "module": "module",
        "function": "F.conv1d",
        "compiled": "compiled",
        "script": "TorchScript",
        "keras": "Keras",
    }
    counts = {way: sum(1 for call in calls if call.via == way) for way in dict.fromkeys(call.via for call in calls)}
    used = ", ".join(f"{ways[way]} × {count}" for way, count in counts.items())
    first = calls[0]
    total = sum(estimated_bytes(call) for call in calls)
    found = {"used": used, "shape": first.shape, "dtype": first.dtype, "nbytes": total}
    return LayerRow(**{**row.__dict__, **found, "nbytes_per_sample": total / batch if batch else None})


def _forecast(rows: list[LayerRow], batch: int) -> str:
    total = sum(row.nbytes or 0 for row in rows)
    each = f", {human_bytes(total / batch)} a sample (batch of {batch})" if batch else ""
    return f"kept: {human_bytes(total)} in this pass{each}"


def _table(rows: list[LayerRow], columns: tuple[str, ...], note: str = "") -> Table:
    def cells(row: LayerRow) -> tuple[Any, ...]:
        shown = {
            **row.__dict__,
            "shape": "" if row.shape is None else shapes_text(row.shape),
            "dtype": dtype_text(row.dtype),
            "bytes": None if row.nbytes is None else human_bytes(row.nbytes),
            "per sample": None if row.nbytes_per_sample is None else human_bytes(row.nbytes_per_sample),
        }
        return (row.name, row.type, *(shown[column] for column in columns))

    return Table(("layer", "type", *columns), Rows(rows, cells), notes=[note], items=rows)
