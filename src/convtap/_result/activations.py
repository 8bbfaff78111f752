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
    """The outputs of a capture by call key, in execution order.

    An output is a tensor, such as (B, C, T), or the structure of tensors that the layer returned.
    The key of a layer that ran once is its name. A layer that ran several times has the keys ``name#0``, ``name#1``, …
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
            LayerNotFound: the capture has no such layer, or the layer was selected but did not run.
            AmbiguousCall: the layer ran several times.
        """
        if not isinstance(key, str):
            raise not_a_name(self._log, key)
        found = find_output(self._log, key)
        if found is MISSING:
            raise missing(self._log, key)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the output of a call, or ``default`` if it does not exist.

        Raises:
            AmbiguousCall: the layer ran several times.
        """
        try:
            found = find_output(self._log, key) if isinstance(key, str) else MISSING
        except LayerNotFound:  # the call exists, but its output does not have the part
            return default
        return default if found is MISSING else found

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    # -- calls

    def calls(self, name: str | None = None, forward: int | None = None) -> list[Call]:
        """Returns the calls in execution order.

        Args:
            name: the layer; None for all layers.
            forward: the number of the forward pass; None for all passes.

        Raises:
            LayerNotFound: ``name`` was neither captured nor selected.
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
        """Joins the outputs of a layer's calls along an axis.

        Args:
            name: the layer. None joins the outputs of each layer over all forward passes and returns them as a dict. Its
                keys are ``conv``, or ``conv#0``, ``conv#1``, … if the layer ran several times in one pass.
            dim: the axis, such as -1 for time.

        Raises:
            LayerNotFound: the layer has no output.
            Unsupported: an output is not a single tensor, or the shapes do not match.
        """
        if name is None:
            return {key: joined_outputs(key, outputs, dim) for key, outputs in by_key_in_pass(self._log).items()}
        outputs = [call.output for call in self.calls(name)]
        if not outputs:
            raise missing(self._log, name)
        return joined_outputs(name, outputs, dim)

    def rename(self, names: Mapping[str, str]) -> Activations:
        """Returns the same outputs with other names for some layers.

        For example, ``acts.rename({"encoder.0": "early"})`` renames one layer. The values are shared, not copied.

        Raises:
            LayerNotFound: a layer in ``names`` does not exist.
            InvalidType, InvalidValue: ``names`` is not a mapping of names to names, or two layers would have the same name.
        """
        return Activations(renamed(self._log, names))

    def join(self, other: Activations) -> Activations:
        """Returns the outputs of two captures, those of ``other`` last.

        The forward passes of ``other`` get the numbers that follow. If both captures have a layer of the same name, the
        result has one layer with all of its calls. The values are shared, not copied.

        Raises:
            InvalidType: ``other`` is not an ``Activations``.
        """
        if not isinstance(other, Activations):
            raise InvalidType(f"other={brief(other)} is not an Activations. Write acts.join(other_acts).")
        return Activations(joined(self._log, other._log))

    @property
    def inputs(self) -> dict[str, Any]:
        """The input of each call by key, if the capture has ``inputs=True``.

        Raises:
            NotCaptured: the capture was not opened with ``inputs=True``.
        """
        return {key: call.input for key, call in self._log.index().items()}

    @property
    def coverage(self) -> Coverage:
        """Tells whether each selected layer was captured, idle or bypassed."""
        return self._log.made(_coverage)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the outputs keep alive. Shared memory counts once."""
        return sum(held_bytes(self._log.calls.values()).values())

    def clear(self) -> None:
        """Removes all outputs. The counts of ``coverage`` stay."""
        self._log.clear()

    # -- per input

    def samples(self, lengths: Any = None, timeline: Any = None) -> list[dict[str, Tensor]]:
        """Returns the outputs of each input, as one dict per input; see ``sample``.

        Args:
            lengths: the number of samples of each input without padding, (B,), over all forward passes. Each output is then
                cut to the frames of the unpadded input. A warning names the layers whose frames have other values than
                the unpadded input would produce.
            timeline: the timeline of the model, ``convtap.timeline(model, example)``, which tells how many frames those are.

        Raises:
            InvalidValue: only one of the two is passed, the number of lengths is not the number of inputs, a length exceeds
                its input, or the timeline belongs to another model.
            Unsupported: no axis of an output has the size of the input batch, or its time axis is unknown.
        """
        if lengths is None and timeline is None:
            return self._log.made(Samples).all()
        return self._log.made(Samples).valid(lengths, timeline)

    def sample(self, i: int) -> dict[str, Tensor]:
        """Returns the outputs for one input: (C, T) if a layer returns (B, C, T).

        The keys are the layers' names within the forward pass: ``conv``, or ``conv#0``, ``conv#1``, … if the layer ran
        several times in the pass, and ``name[0]``, … for the tensors of a structure. Each tensor owns its memory. Inputs
        are numbered across forward passes.

        Raises:
            OutOfRange: the input does not exist.
            Unsupported: no axis of an output has the size of the input batch.
        """
        return self._log.made(Samples).one(i)

    # -- elsewhere

    def numpy(self) -> dict[str, Any]:
        """Returns the outputs as NumPy arrays, by key.

        bfloat16 and float8 become float32, which is exact. A sparse or quantized output becomes a dense array, and so does
        a DTensor if this process holds all of it.

        Raises:
            Unsupported: an output is nested, on meta, or a DTensor that other processes hold a part of.
        """
        return {key: map_leaves(partial(to_numpy, key=key), call.output) for key, call in self._log.index().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the outputs to one safetensors file, which ``convtap.load`` reads back.

        Raises:
            StoreError: the file cannot be written, or safetensors cannot store an output.
        """
        write(self._log, path)

    def statistics(self, *, per: str = "channel", calls: str = "join", quantiles: float | None = 0.01) -> Statistics:
        """Returns statistics of the kept outputs; see ``convtap.statistics``.

        Raises:
            InvalidValue: an option is invalid.
            Unsupported: an output has no ordinary values, or its number of channels changes between calls.
        """
        from convtap._result.statistics import statistics_of  # a capture does not need it

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
        """Draws the outputs for one input as a matplotlib Figure; see ``convtap.plot``.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        draw = _public_module("plot").plot
        return draw(self, sample, layers, signal, sample_rate, timeline, channels, channels_last, span)

    def report(self, path: str | os.PathLike[str], model: torch.nn.Module | None = None, **options: Any) -> None:
        """Writes a self-contained HTML page; ``convtap.report.report`` has the options.

        Raises:
            StoreError: the file cannot be written.
        """
        _public_module("report").report(self, path, model, **options)

    def summary(self, stats: bool = False, rows: int | None = MOST) -> Table:
        """Returns a table with one line per call.

        Args:
            stats: whether to add statistics of the values: the min, mean, max and standard deviation (of the population) of
                the finite values, the share of zeros among all values, and the numbers of NaN and Inf.
            rows: the maximum number of calls to print, the first and the last; None for all. Indexing the table also reaches
                the other calls, until ``clear`` removes their outputs.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        return call_table(self._log, stats, rows, self.coverage)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def _public_module(module: str) -> Any:
    """Imports a public module on demand, since it imports this one."""
    return importlib.import_module(f"convtap.{module}")


def _coverage(log: Log) -> Coverage:
    return Coverage(log.states(), log.notes)


def log_of(acts: Activations) -> Log:
    """Returns the log of an ``Activations``."""
    return acts._log
