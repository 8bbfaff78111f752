"""One batch through the model, with its layers captured: device, mode, autocast, early end, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from convtap._capture import Capture
from convtap._disk.chain import ValidLengths
from convtap._disk.rows import Calls, values_of
from convtap._errors import InvalidType, InvalidValue, NotCaptured, listed
from convtap._select import Selection, select
from convtap._structure import walk_tensors
from convtap._tapped import tapped
from convtap._verdict import conclude


def default_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turns a batch into what the model is called with: a tensor, a dict of keywords, or the first element of a sequence.

    Raises:
        InvalidType: it is none of these.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return default_inputs(batch[0])
    raise InvalidType(
        f"a batch is a {type(batch).__name__}, and the model is called with a tensor, a dict of keywords, or the first element "
        "of a tuple. Pass inputs=lambda batch: ((batch.x,), {}) to say what the model gets."
    )


def checked_inputs(inputs: Callable[[Any], Any] | None, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Calls the user's ``inputs``, or the default.

    Raises:
        InvalidType: it does not return ``(args, kwargs)``.
    """
    if inputs is None:
        return default_inputs(batch)
    found = inputs(batch)
    if (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], (tuple, list))
        and isinstance(found[1], Mapping)
    ):
        return tuple(found[0]), dict(found[1])
    raise InvalidType(
        f"inputs(batch) returned a {type(found).__name__}, and it must return (args, kwargs): "
        "inputs=lambda batch: ((batch['audio'],), {'mask': batch['mask']})."
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value.to(device) if hasattr(value, "to") else type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device) if hasattr(value, "to") else value


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
        fresh: whether nothing was stored before, so that a first batch without any output is an error.

    Attributes:
        look: what is shown the calls of each batch, and the batch, before they become rows.
        ran: the layers that have run so far.
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
        stop: bool | None,
        rule: ValidLengths | None,
    ) -> None:
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise InvalidType(f"autocast is {autocast!r}, and it must be a dtype such as torch.bfloat16, or None.")
        self._options = capture
        self._whole = _quiet(Capture(model, layers, **capture, stop=bool(stop), strict=False))
        self.selection: Selection = select(model, layers, self._whole._asked.types)
        self._model = model
        self._device = find_device(model, device)
        self._autocast = autocast
        self._stop = stop
        self._rule = rule
        self._layers = layers
        self._tapped: Any = None
        self._compiled: Any = None
        self._compile = compile
        self._early: Capture | None = None
        self._settled: set[Any] = set()
        self.fresh = True
        self.look: Callable[[Calls, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.ran: set[str] = set()

    def __enter__(self) -> Runner:
        if self._compile:
            self._tapped = tapped(self._model, self._layers, **self._options)
            self._compiled = torch.compile(self._tapped)
        return self

    def __exit__(self, *error: object) -> None:
        """Takes off the model what compiled running has put on it."""
        if self._tapped is not None:
            self._tapped.close()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        """Runs one batch. Returns what each call of a selected layer gave, in execution order.

        Raises:
            NotCaptured: a layer was bypassed, or ran in another thread, or nothing at all ran in the first batch.
        """
        args, kwargs = _moved(args, self._device), _moved(kwargs, self._device)
        with torch.inference_mode(), self._casting():
            if self._rule is not None:
                self._rule.learn(args, kwargs)
            if self._compiled is not None:
                return self._shown(self._run_compiled(args, kwargs), args, kwargs)
            shape = tuple(tuple(tensor.shape) for _, tensor in walk_tensors((args, kwargs)))
            early = self._early if shape in self._settled else None
            block: Any = early or self._whole
            with block as acts:
                opened = block._open
                self._model(*args, **kwargs)
            self._judge(opened, acts)
            recorded = acts.calls()
            calls = self._shown(values_of(recorded), args, kwargs)
        # through TorchScript, or a Keras model, a pass cannot be ended
        can_end = all(call.via in ("module", "function") for call in recorded)
        if early is None and self._stop is None and can_end:
            self._settle(calls, shape)
        self.ran.update(name for name, _, _ in calls)
        return calls

    def _shown(self, calls: Calls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        if self.look is not None:
            self.look(calls, args, kwargs)
        return calls

    def _casting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, dtype=self._autocast)

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
        _, outputs = self._compiled(*args, **kwargs)
        calls = [(*self._split(key), value) for key, value in outputs.items()]
        self.ran.update(name for name, _, _ in calls)
        return calls

    def _split(self, key: str) -> tuple[str, int]:
        """Splits the key of a call into the layer's name and the number of the call."""
        name, mark, number = key.rpartition("#")
        if key in self.selection.modules or not mark:
            return key, 0
        return name if name in self.selection.modules else name.removesuffix("#"), int(number)

    def _judge(self, block: Any, acts: Any) -> None:
        """Raises for what was not captured though it ran; a layer that did not run is no error here."""
        recorder = block.recorder
        if recorder.failure is not None:
            raise recorder.failure
        coverage = acts.coverage
        if coverage.bypassed or (self.fresh and not coverage.captured):
            block.log.exact = ()
            conclude(block.log, recorder, block.passes, block.selection, strict=True, functional=block.functional)
        if recorder.elsewhere:
            where = listed([f"{name} in {thread}" for thread, name in recorder.elsewhere.items()])
            raise NotCaptured(f"layers ran in threads that the model started, where they are not seen: {where}.")
        self.fresh = False

    def _settle(self, calls: Calls, shape: Any) -> None:
        """Allows inputs of this shape to end early, if each selected layer ran exactly once."""
        names = [name for name, _, _ in calls]
        selected = {*self.selection.modules, *self.selection.function_names}
        if len(set(names)) != len(names) or not selected <= set(names):
            return
        if self._early is None:
            self._early = _quiet(Capture(self._model, names, **self._options, stop=True, strict=False))
            self._early_names = set(names)
        if set(names) == self._early_names:
            self._settled.add(shape)


def _quiet(capture: Capture) -> Capture:
    capture._judges = False  # what is missing is judged over the whole run
    return capture
