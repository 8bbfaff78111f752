"""The public context manager ``capture``."""

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
    """Records the outputs of a model's 1-D convolutions while the model runs.

    Open it in a ``with`` statement and run the model inside. The result is an ``Activations``, a mapping from each layer's
    name to its output.

    The model does not change: its definition, weights, mode and results stay the same. convtap removes all hooks when the
    ``with`` statement ends, even if the model raises.

    Examples:
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
        layers: the layers to capture; None for every 1-D convolution. Pass one selector or a list of selectors. A selector
            is an exact name, a glob (``"encoder.*.conv?"``), a ``re.Pattern`` (full match), a module type, a module of the
            model, an int (a position among the layers of ``types``), or a function ``(name, module) -> bool``. An exact name
            or a module selects a layer of any type. The other selectors choose among the layers of ``types``. After a name
            or a glob, ``[0]`` or ``[hidden][1]`` selects a part of a tuple, dict or dataclass, as in ``"lstm[0]"``.
        types: the module types that selectors choose from; by default Conv1d and its quantized forms.
        at: what to capture: the layer's ``"output"`` or ``"input"``, or ``"activation"`` for the output of the first
            activation that uses the layer's output. Normalization, dropout, reshaping and an added bias may lie between.
        detach: whether to detach outputs from the autograd graph. If False, captured outputs lie in the graph, upstream of
            the loss, so that ``torch.autograd.grad(loss, acts[name])`` works.
        copy: whether captured values survive later in-place operations. If False, convtap keeps an alias, and reading an
            alias that the model has changed raises ``ModifiedInPlace``.
        offload: a device to move outputs to, such as ``"cpu"``. Copies from CUDA run while the model continues. Reading an
            output waits for its own copy, and leaving the ``with`` statement waits for all of them.
        dtype: the type to cast floating-point outputs to.
        reduce: a function to apply to each output, such as ``lambda t: t.mean(-1)``. It runs on the output's own device,
            before anything else. A mapping from names and globs to functions reduces each layer in its own way, and keeps
            layers without an entry as they are.
        keep: ``"all"`` to keep every call of a layer, ``"last"`` to keep only its last call.
        max_bytes: a limit on the memory of captured values, in bytes or as a string such as ``"2GB"``.
        grads: whether to also record d(loss)/d(output) of every call, as ``Call.grad``. The backward pass may run inside the
            capture or after it. ``dtype`` and ``offload`` apply to gradients, and ``reduce`` does not. ``max_bytes`` counts
            them in advance.
        stop: whether to end the forward pass once every selected layer has run. Needs ``layers``. The call of the model has
            to be the last statement inside the capture, since the statements after it do not run.
        activations: module types that count as activations, in addition to those of PyTorch.
        functional: whether to also capture convolutions that are called as functions (``F.conv1d``), named after the owner
            of their weight. None means True. False captures only calls of modules.
        every: record only forward passes 0, n, 2n, …, for training loops. A layer that runs only in other passes is not
            captured.
        inputs: whether to also keep the input of each call, as ``Call.input`` and in ``acts.inputs``. All options apply to
            inputs too, including ``reduce`` and ``dtype``.
        strict: whether a missing output raises ``NotCaptured`` on exit. If False, convtap warns instead.

    Raises:
        LayerNotFound: a selector, or an entry of ``reduce``, matches no layer.
        NotCaptured: on exit: nothing was captured, a layer selected by its exact name did not run, or a selected layer was
            bypassed.
        MemoryLimitExceeded: in the forward pass: the next output would exceed ``max_bytes``.
        ConvtapError: an argument is invalid (also a TypeError or a ValueError), or ``reduce`` failed.
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
                "this capture is already open, and it cannot be opened twice. Open a second one with capture(model)."
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
        try:  # without a call before it. See Note: [Interrupts]
            session.undo()
        finally:
            session.undo()  # nothing, unless an interrupt struck. See Note: [Interrupts]
            self._session = None
        return session.conclude(error)

    def __getitem__(self, key: object) -> NoReturn:
        raise InvalidType(
            f"[{brief(key)}] reads from the capture, which is not the mapping of outputs. "
            "Run the model inside the capture: with capture(model) as acts: model(x)"
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise InvalidType("a capture is not callable. Call the model inside it: with capture(model) as acts: model(x)")

    def __getattr__(self, name: str) -> NoReturn:
        hint = ""
        if hasattr(Activations, name):
            hint = f" Activations have it: with capture(model) as acts: model(x), then acts.{name}."
        raise AttributeError(f"a capture has no attribute {name!r}.{hint}")


capture = Capture
