"""The public ``extract``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convtap._dataset.batches import IterPlan, MapPlan, plan
from convtap._dataset.fingerprint import check_same, function_identity, model_identity
from convtap._dataset.job import Job
from convtap._dataset.layout import RankFolder, describe, note_part, prepare, rank_folders
from convtap._dataset.options import ExtractOptions, extract_options
from convtap._dataset.runner import Runner
from convtap._dataset.shard_format import Id
from convtap._dataset.store import Store
from convtap._dataset.verify import set_bad_aside
from convtap._errors import InvalidValue
from convtap._public import public
from convtap._record.reductions import Reduce
from convtap._select.selection import CONV1D, Layers, Selection, Types


@public
def extract(
    model: nn.Module,
    data: Any,
    into: str | os.PathLike[str],
    layers: Layers = None,
    *,
    types: Types = CONV1D,
    at: Literal["output", "input", "activation"] = "output",
    reduce: Reduce | None = None,
    reduce_id: str | None = None,
    dtype: torch.dtype | None = None,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    ids: Callable[[Any], Sequence[Id] | Tensor] | None = None,
    lengths: Callable[[Any], Sequence[int] | Tensor] | None = None,
    signal: str | int | None = None,
    time_dim: int | None = None,
    calls: Literal["error", "cat", "keys"] = "error",
    labels: Callable[[Any], Any] | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
    device: str | torch.device | None = None,
    method: str | None = None,
    mode: Literal["eval", "train"] = "eval",
    autocast: torch.dtype | None = None,
    compile: bool = False,
    stop: bool = False,
    part: tuple[int, int] | None = None,
    shard_bytes: int | str = "32MB",
    resume: bool = True,
    progress: bool = True,
) -> Store:
    """Runs a model over a data set and streams its layers' outputs to disk.

    Memory stays bounded. A killed run resumes where it stopped if you call it again with the same arguments. The resulting
    store equals that of an uninterrupted run, bit for bit.

    Examples:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from convtap import extract
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> data = TensorDataset(torch.randn(10, 1, 50))
        >>> store = extract(model, data, tempfile.mkdtemp(), batch_size=4, progress=False)
        >>> len(store), store["0"][7].shape, store["2"].shape
        (10, torch.Size([4, 48]), (10, 8, 46))

    Args:
        model: any PyTorch model. It is not changed.
        data: a map-style ``Dataset``, a ``DataLoader`` over one, or any iterable of batches. The loader's batches, workers and
            collate function are kept. The order of the data set replaces a shuffling sampler, and the last, smaller batch is
            not dropped.
        into: a directory that is new, empty, or begun by the same call.
        layers: the layers to extract, as in ``capture``; None for every 1-D convolution.
        types: the module types that selectors choose from; by default Conv1d and its quantized forms.
        at: ``"output"``, ``"input"`` or ``"activation"`` of the layers, as in ``capture``.
        reduce: a function to apply to each output, on the output's device, before it is stored. Its argument is the output of
            a batch, such as (B, C, T). With ``lengths`` it is the output of one sample, such as (C, T) or (T, C), cut to its
            real frames. A mapping from names and globs to functions reduces each layer in its own way. The layer's own name
            comes first, then the first glob that matches. A layer without an entry is stored unchanged.
        reduce_id: a name for ``reduce`` that a resumed run compares instead of its code.
        dtype: the type to cast floating-point outputs to.
        inputs: a function that turns a batch into ``(args, kwargs)`` for the model. By default, a tensor or array is passed
            as it is, a mapping as keyword arguments, and of a tuple or list, such as (x, labels), the first element.
        ids: a function that turns a batch into one int or str for each sample. The default is the index in the data set, or a
            running count for an iterable.
        lengths: a function that turns a batch into the number of real input samples of each row, (B,). Each row is cut to its
            real frames. A warning names the layers whose frames still differ from those of each input alone. ``Store.padding``
            keeps the warning.
        signal: the input that ``lengths`` measures, by the name or the position of the argument. None chooses the input that
            is as long as the longest row and reaches the layers.
        time_dim: the axis of the model's input that is time, such as 1 for (B, T, C); None for the last one.
        calls: how to treat a layer that runs several times in one forward pass: ``"error"`` raises ``Unsupported``, ``"cat"``
            joins its calls on the time axis, and ``"keys"`` stores each call as ``name#k``.
        labels: a function that turns a batch into one label for each sample: a number, or a row of numbers. Labels are stored
            with the samples.
        batch_size: the number of samples in a batch, for a ``Dataset``.
        num_workers: the number of processes that load samples, for a ``Dataset``.
        collate_fn: joins samples into a batch, for a ``Dataset``.
        device: the device to move inputs to; None for the device of the model.
        method: the name of the method to run, such as ``"encode"``; None to call the model itself.
        mode: the mode of the model during the run, ``"eval"`` or ``"train"``. The mode of each module is restored afterwards.
        autocast: the dtype for autocast, such as ``torch.bfloat16``; None to run without autocast.
        compile: whether to run under ``torch.compile``.
        stop: whether to end each forward pass once every selected layer has run once, as in ``capture``. It needs ``layers``.
            Later calls of these layers are not recorded. A model that updates its state at the end of a pass misses the
            update.
        part: ``(i, n)`` to compute only part i of n, counted from 0, for job arrays. The default under ``torch.distributed``
            is the rank.
        shard_bytes: the size of a shard file, in bytes or as a string such as ``"256MB"``. A file holds at least one batch,
            and only whole batches. Memory holds up to two files.
        resume: whether to resume an existing store. If False, an existing store is an error.
        progress: whether to show a progress bar.

    Returns:
        The ``Store`` in ``into``.

    Raises:
        StoreError: the directory cannot be used, was begun with other arguments, or is in use, or the disk is full.
        LayerNotFound: a selector, or an entry of ``reduce``, matches no layer.
        NotCaptured: nothing was captured in the first batch, or a layer was bypassed.
        Unsupported: the rows of a layer's output are not the samples, or it ran several times.
        ConvtapError: an argument is invalid (also a TypeError or a ValueError).
    """
    options = extract_options(
        model,
        layers,
        types=types,
        at=at,
        reduce=reduce,
        reduce_id=reduce_id,
        dtype=dtype,
        inputs=inputs,
        ids=ids,
        lengths=lengths,
        signal=signal,
        time_dim=time_dim,
        calls=calls,
        labels=labels,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_fn,
        device=device,
        method=method,
        mode=mode,
        autocast=autocast,
        compile=compile,
        stop=stop,
        part=part,
        shard_bytes=shard_bytes,
        resume=resume,
        progress=progress,
    )
    return _fill(Path(into), data, options)


def _fill(path: Path, data: Any, options: ExtractOptions) -> Store:
    """Runs the model over the data. Returns the store."""
    runner = Runner(options)
    planned = plan(data, options)
    i, n = _part(options, planned)
    identity = _identity(options, planned)
    where = repr(str(path)) if n == 1 else f"rank {i} of {n}: {str(path)!r}"
    check_same(prepare(path, resume=options.resume), identity, where)

    def claim() -> None:
        check_same(describe(path, identity), identity, where)

    with RankFolder(path, i) as folder, runner:
        if n > 1 or len(rank_folders(path)) > 1:
            note_part(folder, i, n)
        set_bad_aside(path, folder, i, n, options.progress)
        Job(path, folder, planned, runner, i, n).run(claim)
        claim()
    return Store(path)


def _identity(options: ExtractOptions, planned: MapPlan | IterPlan) -> dict[str, Any]:
    """Returns the arguments that a resumed run compares."""
    return {
        "layers": _layers_of(options.selection),
        "at": options.capture.at,
        "reduce": options.reduce_id or _reduce_identity(options.reduce),
        "dtype": None if options.dtype is None else str(options.dtype),
        "calls": options.calls,
        "mode": options.mode,
        "autocast": None if options.autocast is None else str(options.autocast),
        "compile": bool(options.compile),
        "stop": options.capture.stop,
        "method": options.method,
        "signal": options.signal,
        "time_dim": options.time_dim,
        "given": options.functions,
        "data": planned.identity,
        "model": model_identity(options.model),
    }


def _reduce_identity(reduce: Reduce | None) -> Any:
    if isinstance(reduce, Mapping):
        return {key: function_identity(function) for key, function in reduce.items()}
    return function_identity(reduce)


def _layers_of(selection: Selection) -> list[str]:
    """Returns the stored names of a selection.

    Modules and parts come first, in definition order, then functions by name.
    """
    functions = selection.function_names
    return [*(name for name in selection.names if name not in functions), *sorted(functions)]


def _part(options: ExtractOptions, planned: MapPlan | IterPlan) -> tuple[int, int]:
    """Returns ``part`` of the options, else the rank and the number of ranks."""
    if options.part is not None:
        i, n = options.part
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        i, n = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        return 0, 1
    if n > 1 and isinstance(planned, IterPlan) and options.ids is None:
        raise InvalidValue(
            f"part {i} of {n} of an iterable cannot count the samples of the other parts. Pass ids=, or a map-style Dataset."
        )
    return i, n
