"""Taps Keras 3 layers on the torch backend, which do not run PyTorch's hooks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from convtap._record.forward_passes import Passes
from convtap._select.module_tree import is_keras
from convtap._taps.activations import Follower
from convtap._taps.parts import Parted

# Note: [Keras layers]
# Assumption: Keras calls ``layer.call``, also in a functional model and in ``predict``, and an entry in the layer's
#   ``__dict__`` takes precedence. (The shim is set there directly, since Keras tracks the attributes of a layer.)
# Failure: captures may overlap, and each would restore the ``call`` that it found.
# Choice: each layer has one shim with a list of listeners, and the last listener to leave removes it.


class _Shim:
    """Replaces a layer's ``call`` while captures are open."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.listeners: list[Callable[[Callable[..., Any], Any, Any], Any]] = []
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.original
        for listener in self.listeners:
            call = functools.partial(_pass, listener, call)
        return call(*args, **kwargs)


def _pass(listener: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return listener(call, args, kwargs)


class KerasTap:
    """Emits the results of Keras layers' ``call``.

    They include the layer's own activation, and have channels last if the layer does.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Mapping[str, nn.Module],
        recorder: Parted,
        passes: Passes,
        *,
        at: str,
        follower: Follower | None,
    ) -> None:
        self._root = root
        self._layers = layers
        self._recorder = recorder
        self._passes = passes
        self._at = at
        self._follower = follower
        self._is_activated = {name: _has_activation(layer) for name, layer in layers.items()}
        self._placed: list[tuple[nn.Module, Any]] = []

    def open(self) -> None:
        """Places a shim on every layer and one on the root, which counts passes."""
        for name, layer in self._layers.items():
            self._place(layer, functools.partial(self._emit, name))
        if self._follower is not None:
            for layer, is_activation in self._follower.keras_layers():
                self._place(layer, functools.partial(_follow, self._follower, is_activation))
        if is_keras(type(self._root)):
            self._place(self._root, self._count)

    def close(self) -> None:
        """Removes the shims."""
        for layer, listener in reversed(self._placed):
            shim = layer.__dict__.get("call")
            if not isinstance(shim, _Shim):
                continue  # an interrupted close removed it
            if listener in shim.listeners:
                shim.listeners.remove(listener)
            if not shim.listeners:
                del layer.__dict__["call"]
                if shim.original is not getattr(layer, "call", None) and not hasattr(shim.original, "__self__"):
                    layer.__dict__["call"] = shim.original  # the user's own, set on this one layer
        self._placed.clear()

    def _place(self, layer: nn.Module, listener: Any) -> None:
        self._placed.append((layer, listener))  # first: see Note: [Interrupts]
        shim = layer.__dict__.get("call")
        if not isinstance(shim, _Shim):
            shim = layer.__dict__["call"] = _Shim(layer.call)  # type: ignore[arg-type]
        shim.listeners.append(listener)

    def _count(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_symbolic(args):
            return call(*args, **kwargs)
        return self._passes.heard(call, self._root, args, kwargs)

    def _emit(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self._recorder
        if _is_symbolic(args):
            return _claiming(call, args, kwargs)
        if self._at == "input":
            recorder.emit_input(name, args[0] if len(args) == 1 else args, "keras")
            return _claiming(call, args, kwargs)
        recorder.inputs.note(name, args[0] if len(args) == 1 else args)
        try:
            output = _claiming(call, args, kwargs)
            # A layer with its own activation returns the activation's result.
            record = recorder.record if self._at == "activation" and self._is_activated[name] else recorder.emit
            replacement = record(name, output, "keras", (args, kwargs))
            return output if replacement is None else replacement
        finally:
            recorder.inputs.forget(name)


def _follow(
    follower: Follower,
    is_activation: bool,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs a layer that is followed as a whole, unless Keras only infers shapes."""
    if _is_symbolic((*args, *kwargs.values())):
        return call(*args, **kwargs)
    return follower.around(is_activation, call, args, kwargs)


class _Claims(threading.local):
    """Counts this thread's running layers that have their own tap."""

    now = 0


_claims = _Claims()


def is_claimed() -> bool:
    """Returns whether a layer with its own tap is running in this thread.

    The convolution inside is then not a second call.
    """
    return _claims.now > 0


def _claiming(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        _claims.now += 1
        return call(*args, **kwargs)
    finally:
        _claims.now -= 1


def _has_activation(layer: nn.Module) -> bool:
    activation = getattr(layer, "activation", None)
    return activation is not None and getattr(activation, "__name__", "") != "linear"


def _is_symbolic(args: tuple[Any, ...]) -> bool:
    """Returns whether Keras only infers shapes, for which it uses the meta device."""
    device = getattr(args[0], "device", None) if args else None
    return getattr(device, "type", None) == "meta"
