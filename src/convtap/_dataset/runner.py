"""Runs batches through the model and returns its layers' outputs as rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from convtap._capture.session import Session
from convtap._capture.tapped import tapped
from convtap._dataset.options import ExtractOptions
from convtap._dataset.rows import Calls, RowMaker
from convtap._dataset.shard_format import Rows
from convtap._dataset.time_axes import RowAxes
from convtap._dataset.valid_lengths import ValidLengths
from convtap._select.batch import called_with
from convtap._select.example import entry, eval_mode, moved
from convtap._select.parts import split_key


class Runner:
    """Runs batches through a model and turns the selected layers' outputs into rows.

    Inside its context the model has the mode of the options.

    Attributes:
        options: the options of the extraction.
        rule: turns lengths into frames; None without ``lengths``.
        axes: finds the time axis of each row.
        fresh: whether the store was empty, so that a first batch without any output is an error.
        ran: the layers, and the parts of layers, that have run so far.
    """

    def __init__(self, options: ExtractOptions) -> None:
        self.options = options
        self.rule = None if options.lengths is None else ValidLengths(options)
        self.axes = RowAxes(options, self.rule)
        self.fresh = True
        self.ran: set[str] = set()
        self._rows = RowMaker(options, self.rule, self.axes)
        self._forward = entry(options.model, options.method)
        self._compiled: Any = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Runner:
        options = self.options
        self._cleanup.enter_context(eval_mode(options.model, options.mode))
        if options.compile:
            capture, policy = options.capture, options.capture.policy
            module = tapped(
                options.model,
                capture.layers,
                types=capture.types,
                at=capture.at,  # type: ignore[arg-type]
                reduce=policy.reduce,
                dtype=policy.dtype,
            )
            self._cleanup.callback(module.close)
            self._compiled = torch.compile(module)
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the model for a batch."""
        return called_with(self.options.inputs, batch, self.options.model)

    def rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, lengths: list[int] | None = None
    ) -> dict[str, Rows]:
        """Runs one batch. Returns the rows of each layer, on the CPU.

        Args:
            size: the number of samples in the batch.
            lengths: the number of real input samples of each.

        Raises:
            NotCaptured: a layer was bypassed or ran in another thread, or no layer ran in the first batch.
            Unsupported: a layer ran several times, or the rows of its output are not the samples.
        """
        options = self.options
        args, kwargs = moved(args, options.device), moved(kwargs, options.device)
        with torch.inference_mode():
            with self._casting():
                if self.rule is not None:
                    self.rule.learn(args, kwargs, lengths or [], options.selection.modules)
                calls = self._captured(args, kwargs) if self._compiled is None else self._traced(args, kwargs)
                self.axes.look(calls, args, kwargs)
            self.ran.update(layer + part for layer, part, _ in calls)
            return self._rows.columns(calls, size)

    def idle(self) -> list[str]:
        """Returns the selected modules and parts that have not run so far."""
        selection = self.options.selection
        return [name for name in selection.names if name not in self.ran and name not in selection.function_names]

    def _casting(self) -> AbstractContextManager[Any]:
        dtype = self.options.autocast
        return nullcontext() if dtype is None else torch.autocast(self.options.device.type, dtype=dtype)

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        with Session(self.options.capture) as session:
            self._forward(*args, **kwargs)
        session.check(needs_output=self.fresh)
        self.fresh = False
        return [(call.layer, call.part, call.output) for call in session.log.calls.values()]

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        _, outputs = self._compiled(*args, **kwargs)
        known = self.options.selection.modules
        return [(layer, part, value) for key, value in outputs.items() for layer, _, part in [split_key(key, known)]]
