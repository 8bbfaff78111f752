"""One batch through the model, with its layers captured: device, mode, autocast, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from convtap._capture.options import capture_options
from convtap._capture.session import Session
from convtap._capture.tapped import tapped
from convtap._dataset.rows import Calls, values_of
from convtap._dataset.valid_lengths import ValidLengths
from convtap._errors import InvalidType, InvalidValue, Unsupported
from convtap._select.batch import Inputs, called_with, naming_inputs
from convtap._select.example import entry, moved
from convtap._select.parts import split_key
from convtap._select.selection import Selection, select


def find_device(model: nn.Module, device: Any) -> torch.device:
    """Returns where inputs go: where the model's first parameter is.

    Raises:
        InvalidValue: ``device`` is no device, or another one than the model's.
    """
    tensors = [*model.parameters(), *model.buffers()]
    own = tensors[0].device if tensors else torch.device("cpu")
    if device is None:
        return own
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidValue(f"device={device!r} is no device. Write device='cuda', or leave it out.") from None
    if (
        tensors
        and asked not in [tensor.device for tensor in tensors]
        and asked.type not in {t.device.type for t in tensors}
    ):
        raise InvalidValue(
            f"device={str(asked)!r}, but the model is on {str(own)!r}. Move it first: model.to({str(asked)!r})."
        )
    return asked


@contextmanager
def module_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Puts a model into train or eval mode, and every module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            module.training = training


class Runner:
    """Runs batches through a model, and gives what its selected layers gave.

    Args:
        capture: the options of ``Capture``.
        rule: where to note how lengths become frames; None if nobody asks.
        method: the method to run instead of the model itself, or None.
        fresh: whether nothing was stored before, so that a first batch without any output is an error.

    Attributes:
        model: the model.
        look: what is shown the calls of each batch, and the batch, before they become rows.
        ran: the layers, and the parts of layers, that have run so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Any,
        capture: dict[str, Any],
        *,
        device: Any,
        autocast: torch.dtype | None,
        compile: bool,
        stop: bool,
        rule: ValidLengths | None,
        method: str | None = None,
    ) -> None:
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise InvalidType(f"autocast is {autocast!r}, and it must be a dtype such as torch.bfloat16, or None.")
        if compile and method is not None:
            raise Unsupported(
                f"compile=True compiles the model's forward, and method={method!r} is another one. Leave one of them out."
            )
        self._options = capture
        # what is missing is judged over the whole run
        self._capture = capture_options(model, layers, **capture, stop=stop).without_checks()
        self.selection: Selection = select(model, layers, self._capture.types)
        self.model = model
        self._method = method
        self._run = entry(model, method)
        self._device = find_device(model, device)
        self._autocast = autocast
        self._rule = rule
        self._layers = layers
        self._tapped: Any = None
        self._compiled: Any = None
        self._compile = compile
        self.fresh = True
        self.look: Callable[[Calls, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.ran: set[str] = set()

    def __enter__(self) -> Runner:
        if self._compile:
            self._tapped = tapped(self.model, self._layers, **self._options)
            self._compiled = torch.compile(self._tapped)
        return self

    def __exit__(self, *error: object) -> None:
        """Takes off the model what compiled running has put on it."""
        if self._tapped is not None:
            self._tapped.close()

    def inputs(self, function: Inputs | None, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what the model is called with for a batch."""
        return called_with(function, batch, self.model)

    def naming_inputs(self, function: Inputs | None, batch: Any) -> AbstractContextManager[None]:
        """Runs the body, which runs the batch: where the model refuses what it is called with, names ``inputs``."""
        return naming_inputs(function, batch, self.model, self._method)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: list[int] | None = None) -> Calls:
        """Runs one batch. Returns what each call of a selected layer gave, in execution order.

        Raises:
            NotCaptured: a layer was bypassed, or ran in another thread, or nothing at all ran in the first batch.
        """
        args, kwargs = moved(args, self._device), moved(kwargs, self._device)
        with torch.inference_mode(), self._casting():
            if self._rule is not None:
                self._rule.learn(args, kwargs, lengths or [], self.selection.modules)
            if self._compiled is not None:
                return self._shown(self._run_compiled(args, kwargs), args, kwargs)
            with Session(self._capture) as session:
                self._run(*args, **kwargs)
            session.check(needs_output=self.fresh)
            self.fresh = False
            calls = self._shown(values_of(session.log.calls.values()), args, kwargs)
        self.ran.update(layer + part for layer, part, _ in calls)
        return calls

    def _shown(self, calls: Calls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        if self.look is not None:
            self.look(calls, args, kwargs)
        return calls

    def idle(self) -> list[str]:
        """Returns the selected modules, and parts of their outputs, that have not run so far."""
        functions = self.selection.function_names
        return [name for name in self.selection.names if name not in self.ran and name not in functions]

    def _casting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, dtype=self._autocast)

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        _, outputs = self._compiled(*args, **kwargs)
        known = self.selection.modules
        calls = [(layer, part, value) for key, value in outputs.items() for layer, _, part in [split_key(key, known)]]
        self.ran.update(layer + part for layer, part, _ in calls)
        return calls
