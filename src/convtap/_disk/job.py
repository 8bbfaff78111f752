"""The loop: batch by batch through the model into shards; what is there already is not computed again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtap._disk.beginning import Beginning
from convtap._disk.chain import checked_lengths
from convtap._disk.forecast import Progress
from convtap._disk.forward import Runner, checked_inputs
from convtap._disk.index import Index, read_index
from convtap._disk.interrupt import Terminated, Termination
from convtap._disk.place import RankFolder, rank_folders, read_finished, set_aside, shard_files, write_finished
from convtap._disk.plan import IterPlan, MapPlan
from convtap._disk.reading import Shard
from convtap._disk.rows import RowMaker
from convtap._disk.shards import Batch, Id
from convtap._disk.writer import Writer
from convtap._errors import CoverageWarning, InvalidType, InvalidValue, StoreError, brief, listed, plural
from convtap._structure import walk_tensors
from convtap._table import human_bytes


class Job:
    """What one process has to do for one store.

    Args:
        part, parts: which of the batches are its own: those whose number, divided by ``parts``, leaves ``part``.
        inputs, ids, lengths, labels: the user's functions of a batch, or None.
    """

    def __init__(
        self,
        path: Path,
        folder: RankFolder,
        planned: MapPlan | IterPlan,
        runner: Runner,
        rows: RowMaker,
        part: int,
        parts: int,
        *,
        inputs: Callable[[Any], Any] | None,
        ids: Callable[[Any], Any] | None,
        lengths: Callable[[Any], Any] | None,
        labels: Callable[[Any], Any] | None,
    ) -> None:
        self._path = path
        self._folder = folder
        self._plan = planned
        self._runner = runner
        self._rows = rows
        self._part = part
        self._parts = parts
        self._inputs = inputs
        self._lengths = lengths
        self._labels = labels
        index = read_index(path)
        self._done = _Done(index)
        self._names = _Names(ids, index, counts=ids is None and isinstance(planned, IterPlan))
        self._beginning = None
        if ids is not None and isinstance(planned, IterPlan):
            self._beginning = Beginning(path, f"rank {part} of {parts}: " if parts > 1 else "", ids)
            planned.look = self._beginning.look
        self._stored = len(index.ids)
        runner.fresh = not index.layers

    def _mine(self, number: int) -> bool:
        return number % self._parts == self._part

    def _wanted(self, number: int) -> bool:
        return self._mine(number) and number not in self._done

    def run(self, shard_bytes: int, settle: Callable[[], None], show: bool) -> None:
        """Computes what is missing. ``settle`` is called before a shard is written."""
        if isinstance(self._plan, IterPlan) and self._is_complete():
            return
        total, left = self._plan.count(self._mine), self._plan.count(self._wanted)
        if left == 0:
            return
        everything = self._plan.count(lambda number: number not in self._done)
        done = self._stored if total is None or left is None else total - left
        bar = Progress(self._path, total=total, done=done, missing=everything, even=self._plan.even, show=show)

        def before(batches: Sequence[Batch]) -> None:
            bar.check_room(batches)
            settle()
            if self._beginning is not None:
                self._beginning.settle()

        writer = Writer(self._folder, shard_bytes, before)
        try:
            with Termination() as termination, bar:
                try:
                    self._loop(writer, bar, termination)
                    writer.flush()
                    bar.update(0, writer.written)
                except BaseException:
                    writer.rescue()
                    raise
        except Terminated:
            raise StoreError(
                f"SIGTERM ended the extraction, and the handler that was there before let the process live. "
                f"{human_bytes(writer.written)} were written; the same call goes on from there."
            ) from None
        if isinstance(self._plan, IterPlan) and self._plan.seen is not None:
            if not self._plan.seen:
                raise InvalidValue("the data has length 0: its iterator gave no batch, so there is nothing to extract.")
            write_finished(self._folder.path, self._plan.seen)
        self._warn_of_idle()

    def _is_complete(self) -> bool:
        count = read_finished(self._path)
        return count is not None and not any(self._wanted(number) for number in range(count))

    def _loop(self, writer: Writer, bar: Progress, termination: Termination) -> None:
        batches = self._plan.batches(self._wanted)
        with contextlib.closing(batches):
            while True:
                with termination.interruptible():
                    found = next(batches, None)
                    if found is None:
                        return
                    batch = self._compute(*found)
                writer.add(batch)
                self._names.keep(batch)
                bar.update(len(batch.ids), writer.written)

    def _compute(self, number: int, indices: list[int] | None, batch: Any) -> Batch:
        args, kwargs = checked_inputs(self._inputs, batch)
        names = self._names.of(number, indices, batch, (args, kwargs))
        full, lengths = 0, None
        if self._lengths is not None:
            full = last_axis((args, kwargs), self._rows.axes.time_dim)
            lengths = checked_lengths(self._lengths, batch, len(names), full)
        calls = self._runner.run(args, kwargs)
        with torch.inference_mode():
            columns = self._rows.columns(calls, len(names), lengths, full)
        labels = None if self._labels is None else _checked_labels(self._labels(batch), len(names))
        return Batch(number, names, columns, labels, {key: self._rows.axes.found[key] for key in columns})

    def _warn_of_idle(self) -> None:
        if self._runner.fresh:
            return
        exact = self._runner.selection.exact
        idle = [name for name in self._runner.selection.modules if name not in self._runner.ran]
        if idle and (exact & set(idle)):
            warnings.warn(
                f"{plural(len(idle), 'selected layer')} did not run in any batch of this run, and nothing is stored of them: "
                f"{listed(idle)}. list_layers(model, example=x) shows how each layer is used.",
                CoverageWarning,
                stacklevel=4,
            )


class _Done:
    """Which batches are stored already."""

    def __init__(self, index: Index) -> None:
        import numpy as np

        numbers = index.batches[:, 0]
        here = np.zeros(int(numbers.max()) + 1 if len(numbers) else 0, np.bool_)
        here[numbers] = True
        self._here = here.tobytes()  # a byte each: asked of every batch of the data, so it has to be quick

    def __contains__(self, number: int) -> bool:
        return number < len(self._here) and self._here[number] == 1


class _Names:
    """Gives the samples of each batch their ids: the user's, the indices of the data set, or a running count."""

    def __init__(self, ids: Callable[[Any], Any] | None, index: Index, *, counts: bool) -> None:
        self._ids = ids
        self._kind: type | None = None
        self._seen: set[Id] = set()
        # of every batch so far, how many samples: where the running count stands when a batch is the next
        self._sizes = dict(index.batches[:, :2].tolist()) if counts else {}
        self._counted = (0, 0)
        if ids is not None:
            self._seen.update(index.ids.tolist())
            self._kind = type(index.ids[0].item()) if len(index.ids) else None

    def of(self, number: int, indices: list[int] | None, batch: Any, inputs: Any) -> list[Id]:
        """Returns the ids of a batch."""
        if self._ids is not None:
            return self._checked(self._ids(batch))
        if indices is not None:
            return [int(index) for index in indices]
        first = next((tensor for _, tensor in walk_tensors(inputs) if tensor.dim()), None)
        if first is None:
            raise InvalidValue(
                "the model is given no tensor with a batch axis, so nobody can count samples. Pass ids=."
            )
        before, count = self._counted
        while before < number:
            count += self._sizes[before]
            before += 1
        self._counted = (before, count)
        self._sizes[number] = first.shape[0]
        return list(range(count, count + first.shape[0]))

    def keep(self, batch: Batch) -> None:
        """Remembers the ids of a batch, which must not come again."""
        if self._ids is not None:
            self._seen.update(batch.ids)

    def _checked(self, found: Any) -> list[Id]:
        listing = found.tolist() if hasattr(found, "tolist") else found
        if isinstance(listing, (str, bytes)) or not hasattr(listing, "__iter__"):
            raise InvalidType(f"ids(batch) returned {brief(found)}, and it must return one int or str for each sample.")
        names: list[Id] = list(listing)
        fresh: set[Id] = set()
        for name in names:
            if not isinstance(name, (int, str)) or isinstance(name, bool) or "\0" in str(name):
                raise InvalidType(f"ids(batch) gave the id {name!r}, and an id is an int or a str (without NUL).")
            self._kind = self._kind or type(name)
            if not isinstance(name, self._kind):
                raise InvalidType(
                    f"ids(batch) gave {name!r} among ids of type {self._kind.__name__}: all int, or all str."
                )
            if name in self._seen or name in fresh:
                raise InvalidValue(
                    f"the id {name!r} comes twice, and a store holds each id once. Give each sample its own."
                )
            fresh.add(name)
        return names


def last_axis(inputs: Any, dim: int = -1) -> int:
    """Returns the length of the padded input: the time axis of the first input tensor that has more than one.

    Raises:
        InvalidValue: there is none.
    """
    shapes = [tensor.shape for _, tensor in walk_tensors(inputs) if tensor.dim() > 1 and tensor.is_floating_point()]
    shapes += [tensor.shape for _, tensor in walk_tensors(inputs) if tensor.dim() > 1]
    if not shapes:
        raise InvalidValue("lengths= needs an input tensor (B, T) or (B, C, T), and the model is given none.")
    return int(shapes[0][dim])


def _checked_labels(found: Any, size: int) -> Tensor:
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidType(
            f"labels(batch) returned a {type(found).__name__} that is no tensor of numbers. Labels of other kinds can be "
            "given when they are read: store.dataset(labels={id: label})."
        ) from None
    if not labels.dim() or labels.shape[0] != size:
        raise InvalidValue(
            f"labels(batch) returned shape {tuple(labels.shape)} for {size} samples. Return a row for each."
        )
    return labels.detach().cpu().contiguous()


def set_bad_aside(path: Path, own: RankFolder, part: int, parts: int, show: bool) -> None:
    """Verifies the shards that this process answers for, and renames the bad ones, so that they are computed again.

    It answers for its own folder, and for those of ranks that are there no more.
    """
    from tqdm import tqdm

    folders = [name for name in rank_folders(path) if int(name[5:]) % parts == part]
    files = [name for name in shard_files(path) if name.split("/")[0] in folders]
    found = []
    for name in tqdm(files, desc="verify", unit="shard", disable=not show or not files, leave=False):
        problem = _problem(path / name)
        if problem is None:
            continue
        with _locked(path, own, int(name[5:].split("/")[0])) as free:
            if free:
                set_aside(path / name)
                found.append(f"{name} ({problem})")
    if found:
        warnings.warn(f"set aside as .bad, to be computed again: {listed(found, 3)}.", CoverageWarning, stacklevel=3)


def _problem(shard: Path) -> str | None:
    try:
        return Shard(shard).problem()
    except StoreError as error:
        return str(error)


@contextlib.contextmanager
def _locked(path: Path, own: RankFolder, rank: int) -> Iterator[bool]:
    """Locks another rank's folder; gives False if its process runs."""
    folder = RankFolder(path, rank)
    if folder.path == own.path:
        yield True
        return
    try:
        folder.__enter__()
    except StoreError:
        yield False
        return
    try:
        yield True
    finally:
        folder.__exit__(None, None, None)
