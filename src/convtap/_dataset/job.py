"""Runs the missing batches of one process through the model and stores their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.batch_checksums import Contents, SameData, contents_of
from convtap._dataset.batches import IterPlan, MapPlan
from convtap._dataset.index import Index, read_index
from convtap._dataset.layout import (
    RankFolder,
    read_finished,
    write_finished,
    write_padding,
)
from convtap._dataset.progress_bar import progress_bar
from convtap._dataset.runner import Runner
from convtap._dataset.sample_ids import SampleIds, ids_as_list
from convtap._dataset.shard_format import Batch
from convtap._dataset.shard_publisher import ShardPublisher
from convtap._dataset.sigterm import Terminated, Termination
from convtap._dataset.stateful_check import StateWatch
from convtap._dataset.valid_lengths import checked_lengths
from convtap._errors import InvalidType, InvalidValue, StoreError, listed, plural, warn_user
from convtap._select.batch import naming_inputs
from convtap._table import human_bytes
from convtap._time.padded import warn


@dataclass(frozen=True)
class _Prepared:
    """The model's arguments for a batch, with its ids, lengths and labels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: Any
    lengths: Any
    labels: Any

    @property
    def contents(self) -> Contents:
        return contents_of((self.args, self.kwargs), self.ids, self.lengths, self.labels)


class Job:
    """The work of one process for one store.

    Args:
        part, parts: the process computes the batches whose number modulo ``parts`` is ``part``.
    """

    def __init__(
        self, path: Path, folder: RankFolder, planned: MapPlan | IterPlan, runner: Runner, part: int, parts: int
    ) -> None:
        self._path = path
        self._folder = folder
        self._plan = planned
        self._runner = runner
        self._options = runner.options
        self._part = part
        self._parts = parts
        named = self._options.ids is not None
        index = read_index(path)
        self._done = _Done(index)
        self._ids = SampleIds(index, named=named, counts=not named and isinstance(planned, IterPlan))
        self._same = SameData(path, index, f"rank {part} of {parts}: " if parts > 1 else "", self._again)
        self._looked = self._same.numbers()
        self._state = StateWatch(self._options.model)
        self._stored = len(index.ids)
        runner.fresh = not index.layers

    def _mine(self, number: int) -> bool:
        return number % self._parts == self._part

    def _wanted(self, number: int) -> bool:
        return self._mine(number) and number not in self._done

    def run(self, claim: Callable[[], None]) -> None:
        """Computes the missing batches. Calls ``claim`` before it writes a shard."""
        total, left = self._plan.count(self._mine), self._plan.count(self._wanted)
        if left == 0 or (isinstance(self._plan, IterPlan) and self._is_complete()):
            with contextlib.closing(self._plan.some(self._looked)) as batches:
                for number, _, batch in batches:
                    self._look(number, self._prepare(batch))
            return
        done = self._stored if total is None or left is None else total - left
        missing = self._plan.count(lambda number: number not in self._done)

        def before() -> None:
            claim()
            if self._runner.rule is not None:
                write_padding(self._folder.path, self._runner.rule.differences)
            self._same.note_first()

        publisher = ShardPublisher(self._folder, self._options.shard_bytes, missing, before)
        try:
            with Termination() as termination, self._bar(total, done) as bar:
                try:
                    self._loop(publisher, bar, termination)
                    publisher.flush()
                    _show(bar, publisher, 0)
                except BaseException:
                    if not self._same.refused:
                        publisher.rescue()
                    raise
        except Terminated:
            raise StoreError(
                f"SIGTERM ended the extraction after {human_bytes(publisher.written)} were written, and the program's own "
                "handler did not end the process. Run the same call again to resume."
            ) from None
        if isinstance(self._plan, IterPlan) and self._plan.seen is not None:
            if not self._plan.seen:
                raise InvalidValue("the data has length 0. Pass an iterable that yields at least one batch.")
            write_finished(self._folder.path, self._plan.seen)
        self._warn_of_idle()

    def _is_complete(self) -> bool:
        count = read_finished(self._path)
        return count is not None and not any(self._wanted(number) for number in range(count))

    def _bar(self, total: int | None, done: int) -> Any:
        name = f"extract -> {self._path.name}"
        return progress_bar(total=total, initial=done, desc=name, unit=" samples", disable=not self._options.progress)

    def _loop(self, publisher: ShardPublisher, bar: Any, termination: Termination) -> None:
        batches = self._plan.batches(self._wanted, self._looked)
        with contextlib.closing(batches):
            while True:
                with termination.interruptible():
                    found = next(batches, None)
                    if found is None:
                        return
                    batch = self._take(*found)
                if batch is None:
                    continue
                publisher.add(batch)
                self._ids.keep(batch)
                _show(bar, publisher, len(batch.ids))

    def _take(self, number: int, indices: list[int] | None, batch: Any) -> Batch | None:
        """Compares a batch if its number is in ``_looked``. Computes it if it is missing."""
        prepared = self._prepare(batch)
        if number in self._looked:
            self._look(number, prepared)
        if not self._wanted(number):
            return None
        options = self._options
        with naming_inputs(options.inputs, batch, options.model, options.method):
            return self._compute(number, indices, prepared)

    def _prepare(self, batch: Any) -> _Prepared:
        args, kwargs = self._runner.inputs(batch)
        functions = (self._options.ids, self._options.lengths, self._options.labels)
        ids, lengths, labels = (None if function is None else function(batch) for function in functions)
        return _Prepared(args, kwargs, ids_as_list(ids), lengths, labels)

    def _look(self, number: int, prepared: _Prepared) -> None:
        ids = prepared.ids if isinstance(self._plan, IterPlan) else None
        self._same.look(number, prepared.contents, (prepared.args, prepared.kwargs), ids)

    def _again(self, number: int) -> Contents | None:
        """Reads a batch again and returns its contents, or None if that is not possible."""
        batch = self._plan.again(number)
        return None if batch is None else self._prepare(batch).contents

    def _compute(self, number: int, indices: list[int] | None, prepared: _Prepared) -> Batch:
        inputs = (prepared.args, prepared.kwargs)
        names = self._ids.of(number, indices, prepared.ids, inputs)
        lengths = None if self._options.lengths is None else checked_lengths(prepared.lengths, len(names))
        contents = prepared.contents  # before the model runs, which may change its inputs
        self._state.before(number)
        columns = self._runner.rows(*inputs, len(names), lengths)
        self._state.after()
        if self._runner.rule is not None:
            warn(self._runner.rule.unwarned())
        labels = None if self._options.labels is None else _checked_labels(prepared.labels, len(names))
        axes = {key: self._runner.axes.found[key] for key in columns}
        return Batch(number, names, columns, labels, contents, axes)

    def _warn_of_idle(self) -> None:
        if self._runner.fresh:
            return
        exact = self._options.selection.exact
        idle = self._runner.idle()
        if idle and (exact & set(idle)):
            warn_user(
                f"{plural(len(idle), 'selected layer')} did not run in any batch of this run, so the store lacks their "
                f"outputs: {listed(idle)}. Print list_layers(model, example=x) to see how each layer is used.",
            )


def _show(bar: Any, publisher: ShardPublisher, samples: int) -> None:
    """Advances the progress bar and shows the bytes written and forecast."""
    about = "" if publisher.forecast is None else f" of about {human_bytes(publisher.forecast)}"
    bar.set_postfix_str(f"{human_bytes(publisher.written)}{about} written", refresh=False)
    bar.update(samples)


class _Done:
    """The numbers of the stored batches."""

    def __init__(self, index: Index) -> None:
        import numpy as np

        numbers = index.batches[:, 0]
        here = np.zeros(int(numbers.max()) + 1 if len(numbers) else 0, np.bool_)
        here[numbers] = True
        self._here = here.tobytes()  # a byte each, for a fast lookup of every batch of the data

    def __contains__(self, number: int) -> bool:
        return number < len(self._here) and self._here[number] == 1


def _checked_labels(found: Any, size: int) -> Tensor:
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidType(
            f"labels(batch) returned a {type(found).__name__}, which is not a tensor of numbers. Pass labels of other kinds to "
            "the reader: store.dataset(labels={id: label})."
        ) from None
    if not labels.dim() or labels.shape[0] != size:
        raise InvalidValue(
            f"labels(batch) returned shape {tuple(labels.shape)} for {size} samples. Return one row for each sample."
        )
    return labels.detach().cpu().contiguous()
