"""The outputs of a capture, as a mapping from call keys to outputs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convtap._errors import AmbiguousCall, InvalidType, LayerNotFound, brief
from convtap._public import public
from convtap._result.call import Call, held_bytes
from convtap._result.combine import joined, renamed
from convtap._result.coverage import Coverage
from convtap._result.file import write
from convtap._result.log import Log
from convtap._result.lookup import find_output, missing, not_a_name
from convtap._result.samples import Samples, by_key_in_pass, joined_outputs
from convtap._result.summary import call_table
from convtap._table import MOST, Table
from convtap._tensors.nested import MISSING, map_leaves
from convtap._tensors.statistics import to_numpy

if TYPE_CHECKING:
    from convtap._result.statistics import Statistics


@public
class Activations(Mapping[str, Any]):
    """The outputs that a block collected, in execution order, by call key.

    A layer that ran once has its name as key; one that ran several times has ``name#0``, ``name#1``, …
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    # -- the mapping

    def __iter__(self) -> Iterator[str]:
        return iter([call.key for call in self._log.numbered()])

    def __len__(self) -> int:
        return len(self._log.calls)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            return find_output(self._log, key) is not MISSING
        except AmbiguousCall:
            return True
        except LayerNotFound:
            return False

    def __getitem__(self, key: str) -> Any:
        """Returns the output of a call.

        Raises:
            LayerNotFound: no such layer here, or it was selected and did not run.
            AmbiguousCall: the layer ran several times.
        """
        if not isinstance(key, str):
            raise not_a_name(self._log, key)
        found = find_output(self._log, key)
        if found is MISSING:
            raise missing(self._log, key)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the output of a call, or ``default`` if there is none.

        Raises:
            AmbiguousCall: the layer ran several times.
        """
        try:
            found = find_output(self._log, key) if isinstance(key, str) else MISSING
        except LayerNotFound:  # the call is here, and has no such part
            return default
        return default if found is MISSING else found

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    # -- calls

    def calls(self, name: str | None = None, forward: int | None = None) -> list[Call]:
        """Returns the calls in execution order: all, those of one layer, those of one forward pass.

        Raises:
            LayerNotFound: ``name`` is neither captured nor selected here.
        """
        if name is not None:
            resolved = self._log.resolve(name)
            if resolved is None:
                raise missing(self._log, name)
            found = list(self._log.runs(resolved))
        elif forward is None:
            return self._log.numbered()
        else:
            found = list(self._log.by_pass().get(forward, ()))
        return found if forward is None else [call for call in found if call.forward == forward]

    def cat(self, name: str | None = None, dim: int = 0) -> Any:
        """Joins the outputs of a layer's calls along an axis (``dim=-1`` for time), or those of every layer.

        Args:
            name: the layer. None for a dict of all: the outputs of all forward passes, joined, by the layer's name within
                its pass: ``conv``, or ``conv#0``, ``conv#1``, … if it ran several times in one.
            dim: the axis.

        Raises:
            LayerNotFound: the layer has no output here.
            Unsupported: an output is not a single tensor, or the shapes do not fit together.
        """
        if name is None:
            return {key: joined_outputs(key, outputs, dim) for key, outputs in by_key_in_pass(self._log).items()}
        outputs = [call.output for call in self.calls(name)]
        if not outputs:
            raise missing(self._log, name)
        return joined_outputs(name, outputs, dim)

    def rename(self, names: Mapping[str, str]) -> Activations:
        """Returns the same outputs with other names for some layers: ``acts.rename({"encoder.0": "early"})``.

        The values are shared, not copied.

        Raises:
            LayerNotFound: no such layer is here.
            InvalidType, InvalidValue: ``names`` is not a mapping of names to names; two layers would have one name.
        """
        return Activations(renamed(self._log, names))

    def join(self, other: Activations) -> Activations:
        """Returns the outputs of two captures: those of ``other`` after these, its forward passes numbered on.

        A layer of one name in both is one layer here, whose calls are those of both. The values are shared, not copied.

        Raises:
            InvalidType: ``other`` is not what a capture collected.
        """
        if not isinstance(other, Activations):
            raise InvalidType(f"other={brief(other)} is not the outputs of a capture. Write acts.join(other_acts).")
        return Activations(joined(self._log, other._log))

    @property
    def inputs(self) -> dict[str, Any]:
        """The input of each call, by key, of a capture with ``inputs=True``.

        Raises:
            NotCaptured: the capture was not opened with ``inputs=True``.
        """
        return {key: call.input for key, call in self._log.index().items()}

    @property
    def coverage(self) -> Coverage:
        """What became of each selected layer."""
        return self._log.made(_coverage)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the outputs keep alive; memory that several of them share counts once."""
        return sum(held_bytes(self._log.calls.values()).values())

    def clear(self) -> None:
        """Forgets the outputs, as if the block began here; what ``coverage`` counts stays."""
        self._log.clear()

    # -- per input

    def samples(self, lengths: Any = None, timeline: Any = None) -> list[dict[str, Tensor]]:
        """Returns the outputs for each input: one dict an input, without the batch axis; see ``sample``.

        Args:
            lengths: the samples of each input before it was padded, (B,), over all forward passes. Each output is then cut
                to the frames that the input makes by itself. A warning names the layers whose frames are still other numbers.
            timeline: ``convtap.timeline(model, example)`` of the model, which says how many frames those are.

        Raises:
            InvalidValue: only one of the two is given; there are not as many lengths as inputs; a length is longer than
                its input; the timeline is of another model.
            Unsupported: an output has no axis of the size of the input batch, or its time axis is unknown.
        """
        if lengths is None and timeline is None:
            return self._log.made(Samples).all()
        return self._log.made(Samples).valid(lengths, timeline)

    def sample(self, i: int) -> dict[str, Tensor]:
        """Returns the outputs for one input, as (C, T) where a layer gives (B, C, T).

        The keys are the layers' names within their forward pass: ``conv``, or ``conv#0``, ``conv#1``, … if the layer ran
        several times in it (``name[0]``, … for the tensors of a structure). Each tensor owns its bytes. Over
        several forward passes the inputs are numbered through.

        Raises:
            OutOfRange: there is no such input.
            Unsupported: an output has no axis of the size of the input batch.
        """
        return self._log.made(Samples).one(i)

    # -- elsewhere

    def numpy(self) -> dict[str, Any]:
        """Returns the outputs as NumPy arrays, by key. bfloat16 and float8 become float32, which is exact.

        A sparse or quantized output becomes a dense array, and so does a DTensor if this process holds all of it.

        Raises:
            Unsupported: an output has no such array: it is nested, on meta, or a DTensor of which other processes hold a part.
        """
        return {key: map_leaves(partial(to_numpy, key=key), call.output) for key, call in self._log.index().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the outputs to one safetensors file, which ``convtap.load`` reads back.

        Raises:
            StoreError: the file cannot be written, or an output has no form on disk.
        """
        write(self._log, path)

    def statistics(self, *, per: str = "channel", calls: str = "join", quantiles: float | None = 0.01) -> Statistics:
        """Returns the statistics of the outputs that are held; ``convtap.statistics`` describes the options.

        Raises:
            InvalidValue: an option has a value that cannot be used.
            Unsupported: an output has no values, or a layer has other channels in another call.
        """
        from convtap._result.statistics import statistics_of  # which a capture does not need

        return statistics_of(self._log.calls.values(), per, calls, quantiles)

    def plot(
        self,
        sample: int = 0,
        layers: Any = None,
        signal: Any = None,
        sample_rate: float | None = None,
        timeline: Any = None,
        channels: int = 64,
        channels_last: Any = None,
        span: Any = None,
    ) -> Any:
        """Draws each layer's output for one input, as a matplotlib Figure; see ``convtap.plot.plot``.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        draw = _public_module("plot").plot
        return draw(self, sample, layers, signal, sample_rate, timeline, channels, channels_last, span)

    def report(self, path: str | os.PathLike[str], model: torch.nn.Module | None = None, **options: Any) -> None:
        """Writes one self-contained HTML page; see ``convtap.report.report``, also for the options.

        Raises:
            StoreError: the file cannot be written.
        """
        _public_module("report").report(self, path, model, **options)

    def summary(self, stats: bool = False, rows: int | None = MOST) -> Table:
        """Returns a table with one line a call; ``stats`` adds the range and counts of its values.

        The statistics are of the finite values: min, mean, max, standard deviation (of the population), and the share of
        zeros among all values; then how many are NaN and Inf.

        Args:
            stats: whether to add them.
            rows: the most calls to print, the first and the last; None for all. Indexing the table reaches the others
                while their outputs are kept, which the table does until ``clear()``.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        return call_table(self._log, stats, rows, self.coverage)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def _public_module(module: str) -> Any:
    """Imports what draws: by its public name and only when it is asked for, since it comes after what it draws."""
    return importlib.import_module(f"convtap.{module}")


def _coverage(log: Log) -> Coverage:
    return Coverage(log.states(), log.notes)


def log_of(acts: Activations) -> Log:
    """Returns the log that a mapping of outputs reads."""
    return acts._log
