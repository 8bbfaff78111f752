"""Extraction in Ray Data, with a callable class for ``Dataset.map_batches``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convtap._dataset.options import extract_options
from convtap._dataset.runner import Runner
from convtap._dataset.shard_format import Rows
from convtap._dataset.valid_lengths import checked_lengths
from convtap._errors import InvalidType, InvalidValue, NotCaptured, Unsupported, did_you_mean, listed
from convtap._record.reductions import Reduce
from convtap._select.selection import CONV1D, Layers, Types
from convtap._tensors.statistics import to_numpy
from convtap._time.padded import warn

#: A function of a batch. Its columns of numbers are tensors, and its ragged columns are lists of tensors.
Inputs = Callable[[dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Extractor:
    """Runs batches of a Ray data set through a model, with a column for each layer.

    Each actor of the pool makes its model once. If an actor dies, Ray replaces it and computes its batch again. Pass the
    class and its arguments to ``map_batches``::

        features = ray.data.read_parquet("audio").map_batches(
            convtap.ray.Extractor,
            fn_constructor_args=(make_model, "encoder.*"),
            fn_constructor_kwargs={"inputs": "audio", "reduce": mean_over_time, "device": "cuda"},
            batch_size=32,
            num_gpus=1,
            compute=ray.data.ActorPoolStrategy(size=8),
        )
        features.write_parquet("features")

    A bfloat16 or float8 output becomes float32, which is exact, since NumPy lacks these types. Ray chooses the rows of each
    batch, and the outputs of a row can differ in their last bits between batches. If that matters, or if the outputs of a
    batch take hundreds of megabytes, use ``extract``.

    Examples:
        >>> import numpy as np
        >>> from torch import nn
        >>> extractor = Extractor(lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU()), inputs="audio")
        >>> out = extractor({"id": np.arange(2), "audio": np.zeros((2, 1, 50), np.float32)})
        >>> {name: column.shape for name, column in out.items()}
        {'id': (2,), 'audio': (2, 1, 50), '0': (2, 4, 48)}

    Args:
        model: a function without arguments that returns the model. Ray sends it to the actors, and each calls it once.
        layers: the layers to extract, as in ``capture``; None for every 1-D convolution.
        types: the module types that selectors choose from.
        at: ``"output"`` or ``"input"`` of the layers.
        reduce: a function to apply to each output, on the output's own device. It takes the outputs of a batch. With
            ``lengths``, it takes one sample (C, T) at a time, cut to its real frames. A mapping from layers to functions works
            as in ``extract``.
        dtype: the type to cast floating-point outputs to.
        inputs: the name of the column to call the model with, or a function of the batch that returns ``(args, kwargs)``.
            None if the batch has only one column.
        lengths: the name of the column with the number of real input samples of each row, or a function of the batch that
            returns these numbers. Each row is cut to its real frames.
        calls: how to treat a layer that runs several times in one forward pass: ``"error"`` raises, ``"cat"`` joins its calls
            on the time axis, and ``"keys"`` adds a column ``name#k`` for each call.
        keep: the columns of the batch to keep; None for all of them.
        device: the device to run the model on; None to leave the model on its device.
        autocast: the dtype for autocast, such as ``torch.bfloat16``.

    Raises:
        LayerNotFound: a selector matches no layer.
        ConvtapError: an argument is invalid (also a TypeError or a ValueError).
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        layers: Layers = None,
        *,
        types: Types = CONV1D,
        at: Literal["output", "input"] = "output",
        reduce: Reduce | None = None,
        dtype: torch.dtype | None = None,
        inputs: str | Inputs | None = None,
        lengths: str | Callable[[dict[str, Any]], Sequence[int] | Tensor] | None = None,
        calls: Literal["error", "cat", "keys"] = "error",
        keep: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        _check(inputs, lengths, at, keep)
        self._inputs = inputs
        self._lengths = lengths
        self._keep = None if keep is None else list(keep)
        self._columns: list[str] | None = None
        options = extract_options(
            _made(model, device),
            layers,
            types=types,
            at=at,
            reduce=reduce,
            dtype=dtype,
            inputs=inputs if callable(inputs) else None,
            lengths=None if lengths is None else self._of_lengths,
            calls=calls,
            device=device,
            autocast=autocast,
        )
        self._runner = Runner(options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns of the batch and a column for each layer.

        Args:
            batch: a dict of arrays, as ``map_batches`` passes it with the default ``batch_format="numpy"``.

        Raises:
            NotCaptured: a layer selected by its name did not run, or a layer was bypassed.
            Unsupported: the rows of an output are not those of the batch, or other layers ran than in earlier batches.
            ConvtapError: the batch is not a dict of arrays, or lacks a column.
        """
        size, kept = self._checked(batch)
        tensors = {name: _as_tensors(column) for name, column in batch.items()}
        args, kwargs = self._called_with(tensors)
        lengths = None if self._lengths is None else checked_lengths(self._of_lengths(tensors), size)
        with self._runner:
            columns = self._runner.rows(args, kwargs, size, lengths)
        if self._runner.rule is not None:
            warn(self._runner.rule.unwarned())
        self._check_columns(list(columns), kept)
        return {**kept, **{name: _as_array(name, rows) for name, rows in columns.items()}}

    def _checked(self, batch: Any) -> tuple[int, dict[str, Any]]:
        """Returns the number of rows and the columns to keep."""
        if not isinstance(batch, Mapping) or not all(hasattr(column, "__array__") for column in batch.values()):
            raise InvalidType(
                f"a batch is a {type(batch).__name__}, but it must be a dict of arrays. Write "
                "map_batches(Extractor, batch_format='numpy', ...)."
            )
        sizes = {name: len(column) for name, column in batch.items()}
        if len(set(sizes.values())) != 1:
            raise InvalidValue(
                f"the columns of a batch have different numbers of rows: {sizes}. Pass columns of the same length."
            )
        kept = {name: self._column(batch, name, "keep") for name in (batch if self._keep is None else self._keep)}
        return next(iter(sizes.values())), kept

    def _column(self, batch: Mapping[str, Any], name: str, option: str) -> Any:
        if name not in batch:
            near = did_you_mean(name, list(batch))
            raise InvalidValue(
                f"{option}= names the column {name!r}, which the batch does not have. It has {listed(batch)}.{near}"
            )
        return batch[name]

    def _called_with(self, tensors: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if callable(self._inputs):
            return self._runner.inputs(tensors)
        if self._inputs is None and len(tensors) > 1:
            raise InvalidValue(
                f"the batch has the columns {listed(tensors)}, and inputs= does not name one to call the model with. Pass "
                f"inputs={next(iter(tensors))!r}, or inputs=lambda batch: ((batch['audio'],), {{}})."
            )
        name = next(iter(tensors)) if self._inputs is None else self._inputs
        column = self._column(tensors, name, "inputs")
        if isinstance(column, Tensor):
            return (column,), {}
        if isinstance(column, list):
            raise InvalidValue(
                f"the rows of {name!r} have different shapes ({listed((str(tuple(row.shape)) for row in column), 3)}). Pad "
                f"them and pass their lengths: inputs=pad with def pad(batch): return (nn.utils.rnn.pad_sequence("
                f"batch[{name!r}], batch_first=True),), {{}}, and lengths=lambda batch: [len(row) for row in batch[{name!r}]]."
            )
        raise InvalidType(
            f"the column {name!r} holds {column.dtype} values, which are not numbers. Name another column as inputs=."
        )

    def _of_lengths(self, tensors: dict[str, Any]) -> Any:
        if callable(self._lengths):
            return self._lengths(tensors)
        return self._column(tensors, str(self._lengths), "lengths")

    def _check_columns(self, found: list[str], kept: dict[str, Any]) -> None:
        """Checks that each batch has the same columns, without duplicates."""
        twice = [name for name in found if name in kept]
        if twice:
            raise InvalidValue(
                f"a layer and a column of the batch are both named {listed(twice)}. Rename the column, or remove it with "
                f"keep=[...]."
            )
        if self._columns is None:
            idle = [name for name in self._runner.idle() if name in self._runner.options.selection.exact]
            if idle:
                raise NotCaptured(
                    f"{listed(idle)} did not run, but a column needs a value in each row. Remove it from layers=, or use "
                    "extract, which accepts missing outputs. list_layers(model, example=x) shows how each layer is used."
                )
            self._columns = found
        elif set(self._columns) != set(found):
            raise Unsupported(
                f"this batch has outputs of {listed(found)}, but earlier batches had outputs of {listed(self._columns)}. A "
                "column needs a value in each row. Select layers that always run, or use extract, which accepts missing "
                "outputs."
            )


def _check(inputs: Any, lengths: Any, at: Any, keep: Any) -> None:
    for name, value in {"inputs": inputs, "lengths": lengths}.items():
        if value is not None and not isinstance(value, str) and not callable(value):
            raise InvalidType(
                f"{name} is a {type(value).__name__}. Pass the name of a column, or a function of a batch."
            )
    if at not in ("output", "input"):
        raise InvalidValue(f"at={at!r} is invalid. Pass 'output' or 'input'.")
    if isinstance(keep, str) or not (keep is None or all(isinstance(name, str) for name in keep)):
        raise InvalidType(f"keep={keep!r} is not a list of column names. Write for example keep=['id'].")


def _made(model: Any, device: Any) -> nn.Module:
    if isinstance(model, nn.Module) or not callable(model):
        raise InvalidType(
            f"model is a {type(model).__name__}, but each actor has to make its own model. Pass a function that returns the "
            "model: Extractor(lambda: model), or better a function that loads it."
        )
    made = model()
    if not isinstance(made, nn.Module):
        raise InvalidType(f"model() returned a {type(made).__name__}. Return a torch.nn.Module.")
    if device is None:
        return made
    try:
        return made.to(device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InvalidValue(
            f"the model cannot be moved to device={str(device)!r}: {error}. For a pool of GPUs, write "
            "map_batches(Extractor, num_gpus=1, ...) and device='cuda'."
        ) from error


def _as_tensors(column: Any) -> Any:
    """Copies a column of numbers to a tensor, and a ragged one to a list of tensors.

    Other columns stay the same. A copy is necessary, since Ray's arrays are shared and read-only, and a model may work in
    place.
    """
    import numpy as np

    array = np.asarray(column)
    if array.dtype != object:
        return array if array.dtype.kind not in "biufc" else _copied(array)
    rows = [np.asarray(row) for row in array]
    if not rows or any(row.dtype.kind not in "biufc" or not row.ndim for row in rows):
        return array
    if len({(row.shape, row.dtype) for row in rows}) == 1:  # lists of one length, as other programs write them
        return _copied(np.stack(rows))
    return [_copied(row) for row in rows]


def _copied(array: Any) -> Tensor:
    import numpy as np

    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native, order="C", copy=True))


def _as_array(name: str, rows: Rows) -> Any:
    import numpy as np

    if isinstance(rows, Tensor):
        return _checked_array(name, to_numpy(rows))
    found = np.empty(len(rows), object)
    for place, row in enumerate(rows):
        found[place] = _checked_array(name, to_numpy(row))
    return found


def _checked_array(name: str, array: Any) -> Any:
    if array.dtype.kind == "c":
        raise Unsupported(
            f"layer {name!r} returns complex numbers, which a table cannot hold. Pass reduce=torch.view_as_real."
        )
    return array
