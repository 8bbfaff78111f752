"""The context manager: wires selection, taps, recorder and result together, and undoes all of it on exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from convtap._arguments import as_selection, check_arguments
from convtap._block import Asked, Block
from convtap._errors import ConvtapError, InvalidType, InvalidValue, brief
from convtap._memory import parse_bytes
from convtap._offload import Offloader
from convtap._policy import Policy
from convtap._reduce import Reduce
from convtap._result import Activations
from convtap._select import CONV1D, Layers, Types, select
from convtap._torch import compile_stance
from convtap._torch.cleanup import Guard, Spent, undo
from convtap.taps.activation import check_activations


class Capture:
    """Collects the outputs of a model's 1-D convolutions while the block runs the model.

    Nothing of the model changes: not its definition, weights, mode or results; and nothing stays on it afterwards.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(4, 8, 3, padding=1))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> {name: tuple(output.shape) for name, output in acts.items()}
        {'0': (2, 4, 50), '2': (2, 8, 50)}

    Args:
        model: any PyTorch model.
        layers: what to capture; None for every 1-D convolution. One of these, or several in a list: an exact name, a glob
            (``"encoder.*.conv?"``), a ``re.Pattern`` (full match), a module type, a module of the model, an int (position
            among the layers of ``types``), a function ``(name, module) -> bool``. An exact name or a module selects
            whatever type it has; the others choose among modules of ``types``. Behind a name or a glob, ``[0]`` or
            ``[hidden][1]`` selects a part of a tuple, dict or dataclass: ``"lstm[0]"``.
        types: the module types to choose from; Conv1d and its quantized forms by default.
        at: ``"output"``; ``"input"`` for what the layer was given; or ``"activation"`` for the output of the first
            activation that consumes the layer's output, through normalization, dropout, reshaping and an added bias.
        detach: keep no autograd graph. With False the captured tensor is upstream of the loss, so that
            ``torch.autograd.grad(loss, acts[name])`` works.
        copy: the captured value survives later in-place operations. With False an alias is kept, and reading one that was
            changed since raises ``ModifiedInPlace``.
        offload: a device to move what is kept to, such as ``"cpu"``. From CUDA the copies run beside the model; reading an
            output waits for its own copy, and leaving the block waits for all.
        dtype: what to cast floating-point outputs to.
        reduce: a function of the output, run on its own device before anything else: ``lambda t: t.mean(-1)``. Or a mapping
            from names and globs to functions; a layer without an entry is kept as it is.
        keep: ``"all"`` calls of a layer, or only the ``"last"``.
        max_bytes: a limit on the memory kept, as an int or ``"2GB"``.
        grads: also collect d(loss)/d(output) of every call, as ``Call.grad``, when a backward pass runs, inside the block
            or after it. ``dtype`` and ``offload`` apply to it, ``reduce`` does not; ``max_bytes`` counts it beforehand.
        stop: end the forward pass once every selected layer has run once. Needs ``layers``; for the block's last statement.
        activations: module types that count as activations, besides the ones that PyTorch brings.
        functional: also capture convolutions that are called as functions (``F.conv1d``), under the name of their weight's
            owner. None and True: yes; False: only calls of modules.
        strict: leaving the block raises ``NotCaptured`` where something that was asked for is missing; False only warns.

    Raises:
        LayerNotFound: a selector, or an entry of ``reduce``, matches nothing.
        NotCaptured: on exit: nothing was captured, a layer asked for by exact name did not run, or one was bypassed.
        MemoryLimitExceeded: in the forward pass: the next output would go over ``max_bytes``.
        ConvtapError: an argument cannot be used (then it is a TypeError or a ValueError as well), or ``reduce`` failed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        types: Types = CONV1D,
        at: Literal["output", "input", "activation"] = "output",
        detach: bool = True,
        copy: bool = True,
        offload: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        reduce: Reduce | None = None,
        keep: Literal["all", "last"] = "all",
        max_bytes: int | str | None = None,
        grads: bool = False,
        stop: bool = False,
        activations: Sequence[type[nn.Module]] = (),
        functional: bool | None = None,
        strict: bool = True,
    ) -> None:
        compile_stance.refuse_inside_compiled()
        layers = as_selection(layers)
        types_asked = check_arguments(model, layers, types)
        for option, value in (("detach", detach), ("copy", copy), ("stop", stop), ("strict", strict), ("grads", grads)):
            _check_choice(option, value, (True, False))
        _check_choice("functional", functional, (None, True, False))
        _check_choice("at", at, ("output", "input", "activation"))
        _check_choice("keep", keep, ("all", "last"))
        if stop and layers is None:
            raise InvalidValue(
                "stop=True needs layers: without them nobody can say which layer is the last. "
                "Write for example capture(model, 'encoder.conv3', stop=True)."
            )
        if grads and at == "input":
            raise InvalidValue(
                "grads=True collects gradients of outputs, and at='input' captures none. Leave at= out, or capture "
                "with detach=False and take torch.autograd.grad(loss, acts[name])."
            )
        kinds = check_activations(activations)
        if kinds and at != "activation":
            raise InvalidValue(f"activations= says what counts as one with at='activation', and at is {at!r}.")
        self._asked = Asked(
            model=model,
            layers=layers,
            types=types_asked,
            at=at,
            policy=Policy(detach=detach, copy=copy, reduce=reduce, dtype=dtype),
            offloader=None if offload is None else Offloader(offload),
            last=keep == "last",
            max_bytes=None if max_bytes is None else parse_bytes(max_bytes, "max_bytes"),
            grads=grads,
            stop=stop,
            activations=kinds,
            functional=functional,
        )
        self._strict = strict
        self._judges = True
        self._open: Block | None = None
        if layers is not None or isinstance(reduce, Mapping):  # a wrong name is an error here, where it was written
            self._asked.reductions(select(model, layers, types_asked))

    def __enter__(self) -> Activations:
        if self._open is not None:
            raise ConvtapError(
                "this capture is open already, and one object holds one block. Open a second one with capture(model)."
            )
        compile_stance.refuse_inside_compiled()
        block = Block(self._asked)
        try:
            self._open = block
            self._guard = Guard(block.steps)
            block.open()
            return Activations(block.log)
        except BaseException:
            undo(block.steps)
            self._open = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        block = self._open
        assert block is not None
        try:  # and no call before it
            undo(block.steps)
        finally:
            undo(block.steps)  # nothing, unless an interrupt struck. See Note: [Interrupts]
            self._open = None
            self._guard.__class__ = Spent  # type: ignore[assignment]
        return block.close(error, self._strict if self._judges else None)

    def __getitem__(self, key: object) -> NoReturn:
        raise InvalidType(
            f"this is the capture itself, not what it collects, so [{brief(key)}] means nothing here. "
            "Run the model inside a block: with capture(model) as acts: model(x)"
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise InvalidType(
            "a capture is not called; the model is, inside its block: with capture(model) as acts: model(x)"
        )

    def __getattr__(self, name: str) -> NoReturn:
        hint = ""
        if hasattr(Activations, name):
            hint = f" Activations have {name!r}: with capture(model) as acts: model(x), and then acts.{name}."
        raise AttributeError(f"a capture has no attribute {name!r}.{hint}")


capture = Capture


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise InvalidValue(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")
