"""The public ``tapped``: a module that returns the output and those of selected layers, and can be traced."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Collection
from types import FunctionType, TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from typing_extensions import Self

from convtap._capture.traced_functions import FunctionalTap, kernels_of
from convtap._capture.traced_hooks import Sink, enter, is_convolution, keyed, leave
from convtap._errors import (
    ConvtapError,
    CoverageWarning,
    InvalidValue,
    LayerNotFound,
    NotCaptured,
    Unsupported,
    listed,
    plural,
)
from convtap._public import public
from convtap._record.policy import Policy
from convtap._record.reductions import Reduce, Reductions
from convtap._result.keys import separator, stems
from convtap._select.arguments import check_arguments
from convtap._select.module_tree import ModuleTree, is_keras
from convtap._select.selection import CONV1D, FUNCTION, Layers, Types, select
from convtap._torch.hooks import Hooks

# Note: [Tracing hooks]
# Assumption: torch.compile and torch.export trace the hooks that are on the model while they trace, as part of it.
# Failure: Dynamo keeps what it compiled by code object, and does not look at hooks again. All instances of a class share
#   the code of its forward, so one that was compiled with other hooks, or with none, would be run instead, silently.
# Choice: the hooks are put on once, before anything is traced, and write into a sink that is there only while this
#   module's own forward runs. Each instance is of a class of its own, whose forward is a code object of its own (on the
#   instance itself it would be a cycle, and a property a frame that Dynamo looks at), and what that calls is traced into
#   it. Where it is not (a graph break, a part compiled by itself), a layer may be missing: that is an error.


@public
class Tapped(nn.Module):
    """A model that also returns what its selected layers gave, and can be compiled and exported.

    ``forward`` takes what the model takes and returns ``(output, {name: tensor})``, keys as in ``Activations``: a
    layer's name if it ran once, ``name#0``, ``name#1``, … if it ran several times, in execution order. The tensors are
    clones, right whatever the model does in place, and part of the autograd graph. Running the model by itself records
    nothing. The model is the submodule ``model``, so the keys of the state dict begin with ``model.``.

    Convolutions that are called as functions (``F.conv1d``) come out under the names of their kernels, as in ``capture``; one
    with a computed kernel is ``F.conv1d``. A layer that is idle is left out with a ``CoverageWarning``; if it was asked for by
    name, that is an error. Unlike ``capture`` it keeps its hooks until ``close``, the end of its ``with`` block, or until it
    is dropped. Copies and pickles of it have hooks of their own.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import tapped
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(4, 8, 3, padding=1))
        >>> y, acts = tapped(model)(torch.zeros(2, 1, 50))
        >>> {name: tuple(output.shape) for name, output in acts.items()}
        {'0': (2, 4, 50), '2': (2, 8, 50)}

    Args:
        model: any PyTorch model; compile or export what this returns, not the model before.
        layers: what to capture, as in ``capture``; None for every 1-D convolution.
        types: the module types to choose from; Conv1d and its quantized forms by default.
        at: ``"output"``, or ``"input"`` for what the layer was given.
        dtype: what to cast floating-point outputs to.
        reduce: a function of the output, traced with the model: ``lambda t: t.mean(-1)``; or a mapping from layers to such.

    Raises:
        LayerNotFound: a selector matches nothing.
        Unsupported: the model cannot be tapped in this way; the message says how it can.
        NotCaptured: in the forward pass: a layer asked for by name did not run, nothing ran, or a compiled part may have
            run a layer without its hook. In a compiled forward the compiler wraps the error in its own, with the same text.
        ConvtapError: an argument cannot be used, ``reduce`` failed, or the tapped module is closed.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes each instance of a class of its own. See Note: [Tracing hooks]."""
        return super().__new__(_own_class(cls))

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        types: Types = CONV1D,
        at: Literal["output", "input"] = "output",
        dtype: torch.dtype | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        selection = select(model, layers, check_arguments(model, layers, types, "call the result: tapped(model)(x)"))
        _check_at(at, model)
        _check_model(model, selection.modules.values())
        kernels = kernels_of(selection)
        loose = kernels is not None and any(kernel.wanted for kernel in kernels.known)
        if not (selection.modules or selection.function_names or loose):
            raise LayerNotFound(selection.nothing())
        self.model = model
        self.training = model.training
        self._at = at
        self._layers = dict(selection.modules)
        self._parts = {name: selection.parts.get(name, ("",)) for name in self._layers}
        self._kernels = kernels
        parts = [name + part for name, parts in self._parts.items() for part in parts]
        self._selected = [*parts, *selection.function_names]
        self._exact = frozenset(selection.exact)
        self._idle: set[str] = set()
        loose_names = [kernel.name for kernel in (kernels.known if kernels else ())]
        functions = [*selection.function_names, *loose_names, FUNCTION]
        names = [*self._layers, *functions]
        taken = stems(names)
        self._separators = {name: separator(name, taken) for name in names}
        policy, reductions = Policy(detach=False, reduce=reduce, dtype=dtype), Reductions(reduce, selection)
        self._policies = {}
        for key in (*self._selected, *functions):
            function = reductions.of(key)
            self._policies[key] = policy if function is reduce else dataclasses.replace(policy, reduce=function)
        self._closed = False
        self._open()

    def _open(self) -> None:
        type(self).forward.__signature__ = _signature(self.model)  # type: ignore[attr-defined]
        self._sink = sink = Sink()
        self._hooks = hooks = Hooks()
        kernels, at = self._kernels, self._at
        for name, module in {**self._layers, **({} if kernels is None else kernels.layers)}.items():
            kept = tuple((part, self._policies[name + part]) for part in self._parts.get(name, ()))
            if kernels is not None or at == "input":
                hooks.before(module, enter, sink, name, kept if at == "input" else ())
            if kernels is not None or at == "output":
                hooks.after(module, leave, sink, name, kept if at == "output" else (), always=is_convolution(module))
        self._finalizer = weakref.finalize(self, hooks.remove)
        self._finalizer.atexit = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Runs the model, and returns its output and what the layers gave.

        Raises:
            NotCaptured: a layer that must come out did not.
            ConvtapError: it is closed.
        """
        if self._closed:
            self._refuse_closed()
        sink = self._sink
        calls: list[tuple[str, str, Any]] = []
        sink.calls, sink.running = calls, []
        try:
            if self._kernels is None:
                output = self.model(*args, **kwargs)
            else:
                with FunctionalTap(sink, self._kernels, self._policies, self._at):
                    output = self.model(*args, **kwargs)
        finally:
            sink.calls = None
        names = {name + part: True for name, part, _ in calls}
        missing = [name for name in self._selected if name not in names]
        if missing:
            self._missing(missing, len(calls) > 0)
        return output, keyed(calls, self._separators)

    def close(self) -> None:
        """Takes the hooks off the model. The model stays as it is; this module cannot run any more."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        if self._closed:
            self._refuse_closed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def extra_repr(self) -> str:
        """Names the layers."""
        return f"{plural(len(self._layers), 'layer')}: {listed(self._layers)}"

    # -- copies

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_sink", "_finalizer"):
            del state[name]
        return state

    def __reduce__(self) -> Any:
        return _blank, (type(self).__base__,), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_kernels" not in state:  # a pickle of version 0.1.0, whose layers had one policy and no parts
            self._kernels, self._parts = None, dict.fromkeys(self._layers, ("",))
            self._policies = dict.fromkeys(self._layers, self.__dict__.pop("_policy"))
            self._selected, self._exact, self._idle = list(self._layers), frozenset(), set()
        # In a deep copy the old hooks are there, and do nothing. A shallow copy shares the model with its original,
        # whose hooks still work. See Note: [Hooks and copies].
        first = next(iter(self._layers.values()), None)
        if first is None or not self._hooks.are_on(first):
            self._hooks.remove()
        self._open()
        if self._closed:
            self.close()

    # -- what goes wrong; called in a trace, Dynamo runs these while it traces, so that their messages are what one sees

    def _missing(self, missing: list[str], any_came: bool) -> None:
        # Under torch.compile this is traced, also if Dynamo could not trace the forward around it.
        self._refuse_missing(missing, any_came, torch.compiler.is_dynamo_compiling())

    def _refuse_missing(self, missing: list[str], any_came: bool, compiled: bool) -> None:
        """Raises, or warns, if layers did not come out.

        An idle layer is an error if it was asked for by name, if nothing else came out, or if it may have run unseen: in
        compiled code, unless it was idle in an earlier forward that was not compiled.
        """
        asked, parts = [name for name in missing if name in self._exact], ModuleTree(self.model).compiled
        unseen = [name for name in missing if name in parts or (compiled and name not in self._idle)]
        if asked or unseen or not any_came:
            raise NotCaptured(_not_out(asked or unseen or missing, len(self._selected)))
        self._idle.update(missing)
        warnings.warn(
            f"{plural(len(missing), 'selected layer')} did not run in this forward, so the result does not have it: "
            f"{listed(missing)}. Select only layers that run, or pass the name in layers= to make this an error.",
            CoverageWarning,
            stacklevel=6,  # at the call of the tapped module
        )

    def _refuse_closed(self) -> None:
        raise ConvtapError("this tapped model is closed: its hooks are off. Make a new one with tapped(model).")

    # The mark is what torch.compiler.assume_constant_result sets; calling that would import Dynamo, for over a second.
    _refuse_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _refuse_closed._dynamo_marked_constant = True  # type: ignore[attr-defined]


tapped = Tapped


_T = TypeVar("_T", bound=nn.Module)


def _own_class(kind: type[_T]) -> type[_T]:
    """Makes a class for one instance, the same but for the code object of its forward. See Note: [Tracing hooks]."""
    own = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    shared = kind.forward
    # The name must differ as well: Dynamo keeps its guesses about dynamic shapes by file, line and name.
    code = shared.__code__.replace(co_name=f"forward_{id(own):x}")
    own.forward = FunctionType(code, shared.__globals__, "forward", shared.__defaults__, shared.__closure__)  # type: ignore[attr-defined]
    own.forward.__doc__ = shared.__doc__  # type: ignore[attr-defined]
    return own


def _blank(kind: type[_T]) -> _T:
    return kind.__new__(kind)


def _signature(model: nn.Module) -> inspect.Signature:
    """The parameters of a model's forward, behind a ``self``: exporters name the inputs after them."""
    first = inspect.Parameter("_tapped", inspect.Parameter.POSITIONAL_ONLY)
    try:
        return inspect.Signature([first, *inspect.signature(model.forward).parameters.values()])
    except (TypeError, ValueError):  # not written in Python
        return inspect.signature(Tapped.forward)


def _check_at(at: Any, model: nn.Module) -> None:
    if at == "activation":
        kind = "keras.layers.ReLU" if is_keras(type(model)) else "nn.ReLU"
        raise Unsupported(
            f"at='activation' cannot be traced yet. Select the activations themselves: tapped(model, types={kind})."
        )
    if at not in ("output", "input"):
        raise InvalidValue(f"at={at!r} is none of 'output', 'input'.")


def _check_model(model: nn.Module, layers: Collection[nn.Module]) -> None:
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(layer, torch.jit.ScriptModule) for layer in layers):
        raise Unsupported(
            "TorchScript runs no Python hooks, so a scripted model cannot be tapped. Tap the Python model, or write: "
            "with capture(model) as acts: model(x)"
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise Unsupported(
            f"nn.DataParallel runs copies of the model on {len(model.device_ids)} devices, and their hooks would mix: "
            "tap the model inside, tapped(model.module)."
        )


def _not_out(missing: list[str], selected: int) -> str:
    return (
        f"{len(missing)} of {plural(selected, 'selected layer')} did not come out of this forward: {listed(missing)}. If "
        "such a layer is idle, leave it out of layers=; list_layers(model, example=x) shows how each layer is used. If it "
        "does run, a part of the model was compiled by itself before the hooks were on: tap first, then compile the whole, "
        "torch.compile(tapped(model), fullgraph=True). A compiled forward leaves idle layers out if they were idle in a "
        "forward before it was compiled."
    )
