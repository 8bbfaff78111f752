"""The public context manager ``capture``: its options, and one session for each time it is entered."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Literal, NoReturn

import torch
from torch import nn

from convtap._capture.options import capture_options
from convtap._capture.session import Session
from convtap._errors import ConvtapError, InvalidType, brief
from convtap._public import public
from convtap._record.reductions import Reduce
from convtap._result.activations import Activations
from convtap._select.selection import CONV1D, Layers, Types
from convtap._torch import compile_stance


@public
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
        every: keep forward passes 0, n, 2n, … only, for training loops. The other passes keep nothing, and what runs
            only in them is not captured.
        inputs: also keep the input of each call, as ``Call.input`` and in ``acts.inputs``, under the same options; ``reduce``
            and ``dtype`` apply to it too.
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
        every: int = 1,
        inputs: bool = False,
    ) -> None:
        compile_stance.refuse_inside_compiled()
        self._options = capture_options(
            model,
            layers,
            types=types,
            at=at,
            detach=detach,
            copy=copy,
            offload=offload,
            dtype=dtype,
            reduce=reduce,
            keep=keep,
            max_bytes=max_bytes,
            grads=grads,
            stop=stop,
            activations=activations,
            functional=functional,
            strict=strict,
            every=every,
            inputs=inputs,
        )
        self._session: Session | None = None

    def __enter__(self) -> Activations:
        if self._session is not None:
            raise ConvtapError(
                "this capture is open already, and one object holds one block. Open a second one with capture(model)."
            )
        compile_stance.refuse_inside_compiled()
        self._session = session = Session(self._options)
        try:
            session.__enter__()
            return Activations(session.log)
        except BaseException:
            session.undo()
            self._session = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        session = self._session
        assert session is not None
        try:  # and no call before it
            session.undo()
        finally:
            session.undo()  # nothing, unless an interrupt struck. See Note: [Interrupts]
            self._session = None
        return session.conclude(error)

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
