"""The public ``extract``: checks what it is given, and opens the store that the job then fills."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convtap._dataset.batches import IterPlan, MapPlan, plan
from convtap._dataset.fingerprint import check_same, function_identity, model_identity
from convtap._dataset.job import Job, set_bad_aside
from convtap._dataset.layout import RankFolder, check_part, describe, note_part, prepare, rank_folders
from convtap._dataset.rows import RowMaker
from convtap._dataset.runner import Runner, module_mode
from convtap._dataset.shard_writer import Id
from convtap._dataset.store import Store
from convtap._dataset.time_axes import RowAxes
from convtap._dataset.valid_lengths import ValidLengths
from convtap._errors import InvalidType, InvalidValue
from convtap._public import public
from convtap._record.policy import Policy
from convtap._record.reductions import Reduce, Reductions
from convtap._select.selection import CONV1D, Layers, Selection, Types
from convtap._tensors.memory import parse_bytes


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
    shard_bytes: int | str = "256MB",
    resume: bool = True,
    progress: bool = True,
) -> Store:
    """Runs a model over a data set and streams what its layers give to disk, in bounded memory.

    A run that was killed goes on where it stopped when it is called again with the same arguments, and gives what an
    uninterrupted run would have given, bit for bit.

    Example:
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
        model: any PyTorch model; it stays as it is.
        data: a map-style ``Dataset``; a ``DataLoader`` over one (its batches, workers and collate function are kept, a
            shuffling sampler is replaced by the order of the data set, and the last, smaller batch is not dropped); or any
            iterable of batches.
        into: a directory: new, empty, or begun by the same call.
        layers: what to extract, as in ``capture``; None for every 1-D convolution.
        types: the module types to choose from.
        at: ``"output"``, ``"input"`` or ``"activation"`` of the layers, as in ``capture``.
        reduce: a function of each output, run on its own device before it is stored. It sees the batch; with ``lengths``, it
            sees one sample at a time, such as (C, T) or (T, C), cut to its real frames. Or a mapping from layers to functions,
            by name or by glob (a layer's own name comes first, then the first glob that matches); a layer without an entry
            is stored as it is.
        reduce_id: a name for ``reduce`` that a resume compares instead of its code.
        dtype: what to cast floating-point outputs to.
        inputs: turns a batch into ``(args, kwargs)`` for the model. By default a tensor or array is passed, a mapping is
            passed as keywords, and of a tuple or list, such as (x, labels), the first element is passed.
        ids: from a batch, one int or str for each sample. By default indices of the data set, or a running count.
        lengths: from a batch, (B,) numbers of real input samples: each row is cut to the frames that they give. A warning
            names the layers whose frames are still not those of each input alone; ``Store.padding`` keeps it.
        signal: with ``lengths``: which input they are of, by the name or the position of the argument; None for the one that
            is as long as the longest row and reaches the layers.
        time_dim: the axis of the model's input that is time, such as 1 for (B, T, C); None for the last one.
        calls: what to do with a layer that runs several times in one forward pass: an ``"error"``, ``"cat"`` to join its
            calls on time, ``"keys"`` to store each as ``name#k``.
        labels: from a batch, one label (a number, or a row of numbers) for each sample, to store with it.
        batch_size: samples a batch, for a ``Dataset``.
        num_workers: processes that load samples, for a ``Dataset``.
        collate_fn: joins samples to a batch, for a ``Dataset``.
        device: where inputs go; where the model is, if None.
        method: the name of the method to run, such as ``"encode"``; None to call the model itself.
        mode: ``"eval"`` or ``"train"`` during the run; each module gets its own mode back.
        autocast: a dtype to run the model in, such as ``torch.bfloat16``.
        compile: run under ``torch.compile``.
        stop: end each forward pass once every selected layer has run once, as in ``capture``: it needs ``layers``. Later
            calls of these layers are lost, and a model that keeps state from batch to batch misses what it does at the end
            of a pass.
        part: ``(i, n)``: compute the i-th of n parts only, for job arrays. Under ``torch.distributed`` it is the rank.
        shard_bytes: the size of a file, as an int or ``"256MB"``. Up to two of them are in memory.
        resume: go on with a store that is there; False to refuse it.
        progress: show a bar.

    Raises:
        StoreError: the directory cannot be used, was begun with other arguments, is in use, or the disk is full.
        LayerNotFound: a selector, or an entry of ``reduce``, matches nothing.
        NotCaptured: nothing was captured in the first batch, or a layer was bypassed.
        Unsupported: a layer's outputs are no rows of samples, or it ran several times.
        ConvtapError: an argument cannot be used (then it is a TypeError or a ValueError as well).
    """
    functions = {"inputs": inputs, "ids": ids, "lengths": lengths, "labels": labels}
    _check_choices(calls=(calls, ("error", "cat", "keys")), mode=(mode, ("eval", "train")), stop=(stop, (True, False)))
    if stop and compile:
        raise InvalidValue("stop=True cannot end a compiled forward pass. Pass stop=True or compile=True, not both.")
    _check_functions({**functions, "collate_fn": collate_fn})
    Policy(reduce=reduce, dtype=dtype)  # checks both
    chosen: dict[str, Any] = {"method": method, "signal": signal}
    rule = None if lengths is None else ValidLengths(model, at, **chosen, time_dim=-1 if time_dim is None else time_dim)
    capture = {"types": types, "at": at, **({} if rule else {"reduce": reduce, "dtype": dtype})}
    options: dict[str, Any] = {"device": device, "autocast": autocast, "compile": compile, "stop": stop}
    runner = Runner(model, layers, capture, **options, rule=rule, method=method)
    reductions = Reductions(reduce, runner.selection)
    axes = RowAxes(model, runner.selection.tree, at, reductions, rule, time_dim, **chosen)
    runner.look = axes.look
    rows = RowMaker(calls, rule, reductions, dtype, axes)
    planned = plan(data, batch_size, num_workers, collate_fn)
    shard_size = parse_bytes(shard_bytes, "shard_bytes")
    i, n = _part(part, planned, ids)
    identity = {
        "layers": _layers_of(runner.selection),
        "at": at,
        "reduce": reduce_id or _reduce_identity(reduce),
        **_texts(dtype=dtype, calls=calls, mode=mode, autocast=autocast, compile=bool(compile), stop=bool(stop)),
        "method": method,
        "signal": signal,
        "time_dim": time_dim,
        "given": [name for name, function in functions.items() if function is not None],
        "data": planned.identity,
        "model": model_identity(model),
    }
    path = Path(into)
    where = repr(str(path)) if n == 1 else f"rank {i} of {n}: {str(path)!r}"
    check_same(prepare(path, resume=resume), identity, where)

    def settle() -> None:
        check_same(describe(path, identity), identity, where)

    with RankFolder(path, i) as folder, module_mode(model, mode), runner:
        if n > 1 or len(rank_folders(path)) > 1:
            note_part(folder, i, n)
        set_bad_aside(path, folder, i, n, progress)
        job = Job(path, folder, planned, runner, rows, i, n, **functions)
        job.run(shard_size, settle, progress)
        settle()
    return Store(path)


def _texts(**options: Any) -> dict[str, Any]:
    """Options that a resume compares, with dtypes as text."""
    return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in options.items()}


def _reduce_identity(reduce: Reduce | None) -> Any:
    if isinstance(reduce, Mapping):
        return {key: function_identity(function) for key, function in reduce.items()}
    return function_identity(reduce)


def _layers_of(selection: Selection) -> list[str]:
    """The names under which a selection is stored: modules and parts in definition order, then functions by name."""
    functions = selection.function_names
    return [*(name for name in selection.names if name not in functions), *sorted(functions)]


def _check_choices(**given: tuple[Any, tuple[Any, ...]]) -> None:
    for name, (value, choices) in given.items():
        if value not in choices:
            raise InvalidValue(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")


def _check_functions(given: dict[str, Any]) -> None:
    for name, function in given.items():
        if function is not None and not callable(function):
            raise InvalidType(f"{name} is a {type(function).__name__}, and it must be a function of a batch.")


def _part(part: Any, planned: MapPlan | IterPlan, ids: Any) -> tuple[int, int]:
    """Returns which part of how many this process computes: as it was told, else its rank."""
    if part is not None:
        i, n = check_part(part)
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        i, n = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        return 0, 1
    if n > 1 and isinstance(planned, IterPlan) and ids is None:
        raise InvalidValue(
            f"part {i} of {n} of an iterable cannot count the samples that it does not see. Pass ids=, or a map-style Dataset."
        )
    return i, n
