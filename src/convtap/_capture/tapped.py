"""The public module ``tapped``, which can be compiled and exported."""

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
# Assumption: torch.compile and torch.export trace the model's current hooks as part of the model.
# Failure: Dynamo caches compiled code by code object, and does not check hooks again. All instances of a class share the code
#   of its forward, so code that was compiled with other hooks, or without hooks, would run instead, silently.
# Choice: the hooks are registered once, before any trace, and write into a sink that exists only while this module's own
#   forward runs. Each instance has its own class, whose forward is its own code object, and the calls in it are traced into
#   it. (A forward on the instance would be a reference cycle, and a property would be a frame that Dynamo traces.) After a
#   graph break, or in a part that was compiled by itself, a layer may be missing, which is an error.


@public
class Tapped(nn.Module):
    """A model that also returns the outputs of its selected layers.

    It can be compiled and exported. ``forward`` takes the model's arguments and returns ``(output, {name: tensor})`` in
    execution order. The keys are those of ``Activations``: a layer's name if it ran once, ``name#0``, ``name#1``, … if it ran
    several times. The tensors are clones, so in-place operations of the model do not change them, and they are part of the
    autograd graph. Running the model by itself records nothing. The model is the submodule ``model``, so the keys of the
    state dict begin with ``model.``.

    Convolutions that are called as functions (``F.conv1d``) have the names of their kernels, as in ``capture``. One with a
    computed kernel has the name ``F.conv1d``. An idle layer is skipped with a ``CoverageWarning``, or is an error if it was
    selected by its name. Unlike ``capture``, it keeps its hooks until ``close``, until its ``with`` statement ends, or until
    it is garbage-collected. Copies and pickles register their own hooks.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import tapped
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(4, 8, 3, padding=1))
        >>> y, acts = tapped(model)(torch.zeros(2, 1, 50))
        >>> {name: tuple(output.shape) for name, output in acts.items()}
        {'0': (2, 4, 50), '2': (2, 8, 50)}

    Args:
        model: any PyTorch model. Compile or export the tapped model, not this one.
        layers: the layers to capture, as in ``capture``; None for every 1-D convolution.
        types: the module types that selectors choose from; by default Conv1d and its quantized forms.
        at: ``"output"`` or ``"input"`` of the layers.
        dtype: the type to cast floating-point outputs to.
        reduce: a function to apply to each output, or a mapping from layers to functions. It is traced with the model.

    Raises:
        LayerNotFound: a selector matches no layer.
        Unsupported: the model cannot be tapped in this way. The message has the alternative.
        NotCaptured: in the forward pass: a layer selected by name did not run, no layer ran, or a compiled part may have run
            a layer without its hook. In a compiled forward, the compiler raises its own error with the same text.
        ConvtapError: an argument is invalid, ``reduce`` failed, or the tapped model is closed.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes an instance of a new class. See Note: [Tracing hooks]."""
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
        """Runs the model, and returns its output and the layers' outputs.

        Raises:
            NotCaptured: a required output is missing.
            ConvtapError: the tapped model is closed.
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
        """Removes the hooks from the model. This module can no longer run."""
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
        # A deep copy has the old hooks, which do nothing. A shallow copy shares the model with its original, whose
        # hooks still work. See Note: [Hooks and copies].
        first = next(iter(self._layers.values()), None)
        if first is None or not self._hooks.are_on(first):
            self._hooks.remove()
        self._open()
        if self._closed:
            self.close()

    # -- errors; Dynamo runs these functions during a trace, so that the user sees their messages

    def _missing(self, missing: list[str], any_came: bool) -> None:
        # torch.compile traces this, even if Dynamo could not trace the forward around it.
        self._refuse_missing(missing, any_came, torch.compiler.is_dynamo_compiling())

    def _refuse_missing(self, missing: list[str], any_came: bool, compiled: bool) -> None:
        """Raises an error or warns if outputs are missing.

        An idle layer is an error if it was selected by name, or if all outputs are missing. It is also an error if it may
        have run unseen in compiled code, unless it was idle in an earlier forward that was not compiled.
        """
        asked, parts = [name for name in missing if name in self._exact], ModuleTree(self.model).compiled
        unseen = [name for name in missing if name in parts or (compiled and name not in self._idle)]
        if asked or unseen or not any_came:
            raise NotCaptured(_not_out(asked or unseen or missing, len(self._selected)))
        self._idle.update(missing)
        warnings.warn(
            f"the result lacks {plural(len(missing), 'selected layer')} that did not run in this forward pass: "
            f"{listed(missing)}. Select only layers that run, or pass the name in layers= to make this an error.",
            CoverageWarning,
            stacklevel=6,  # at the call of the tapped module
        )

    def _refuse_closed(self) -> None:
        raise ConvtapError("this tapped model is closed. Make a new one with tapped(model).")

    # torch.compiler.assume_constant_result sets this mark, but calling it would import Dynamo, which takes over a second.
    _refuse_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _refuse_closed._dynamo_marked_constant = True  # type: ignore[attr-defined]


tapped = Tapped


_T = TypeVar("_T", bound=nn.Module)


def _own_class(kind: type[_T]) -> type[_T]:
    """Makes a subclass with its own copy of forward. See Note: [Tracing hooks]."""
    own = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    shared = kind.forward
    # The name must differ as well, since Dynamo stores its guesses about dynamic shapes by file, line and name.
    code = shared.__code__.replace(co_name=f"forward_{id(own):x}")
    own.forward = FunctionType(code, shared.__globals__, "forward", shared.__defaults__, shared.__closure__)  # type: ignore[attr-defined]
    own.forward.__doc__ = shared.__doc__  # type: ignore[attr-defined]
    return own


def _blank(kind: type[_T]) -> _T:
    return kind.__new__(kind)


def _signature(model: nn.Module) -> inspect.Signature:
    """Returns the signature of a model's forward, after which exporters name inputs."""
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
        raise InvalidValue(f"at={at!r} is invalid. Pass 'output' or 'input'.")


def _check_model(model: nn.Module, layers: Collection[nn.Module]) -> None:
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(layer, torch.jit.ScriptModule) for layer in layers):
        raise Unsupported(
            "TorchScript runs no Python hooks, so a scripted model cannot be tapped. Tap the Python model, or write: "
            "with capture(model) as acts: model(x)"
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise Unsupported(
            f"nn.DataParallel runs copies of the model on {len(model.device_ids)} devices, and their hooks would mix "
            "the outputs. Tap the model inside: tapped(model.module)."
        )


def _not_out(missing: list[str], selected: int) -> str:
    return (
        f"this forward pass recorded no output of {len(missing)} of {plural(selected, 'selected layer')}: {listed(missing)}. "
        "If such a layer is idle, remove it from layers= (list_layers(model, example=x) shows how each layer is used). If it "
        "does run, a part of the model was compiled by itself before it was tapped. Tap first, then compile the whole: "
        "torch.compile(tapped(model), fullgraph=True). A compiled forward pass skips a layer that was idle in an earlier pass "
        "that was not compiled."
    )
