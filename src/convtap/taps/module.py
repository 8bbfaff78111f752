"""Taps modules: forward hooks that emit their outputs, or their inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from convtap._record import Recorder
from convtap._torch.hooks import Hooks


class ModuleTap:
    """Emits what modules return, or what they are given."""

    def __init__(self, modules: Mapping[str, nn.Module], recorder: Recorder, *, at: str, detach: bool) -> None:
        self._modules = modules
        self._recorder = recorder
        self._at = at
        self._detach = detach
        self._hooks = Hooks()

    def open(self) -> None:
        """Puts one hook on every module."""
        if self._at == "input":
            for name, module in self._modules.items():
                self._hooks.before(module, self._emit_input, name, module)
            return
        # What may be a view of something else, or may be swapped, is looked at more closely.
        kinds: set[Any] = {type(module) for module in self._modules.values()}
        if self._detach and all(map(_is_plain, kinds)):
            self._hooks.after_each(self._modules.values(), self._recorder.emit_module)
            return
        for name, module in self._modules.items():
            kind: Any = type(module)
            if self._detach and _is_plain(kind):
                self._hooks.after(module, self._recorder.emit_module)
            else:
                self._hooks.after(module, self._recorder.emit_shared, name, module, kwargs=True)

    def close(self) -> None:
        """Takes the hooks off."""
        self._hooks.remove()

    def _emit_input(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is tapped:  # see Note: [Hooks and copies]
            self._recorder.emit_input(name, _as_input(args, kwargs), "module")


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Whether a class is a convolution whose forward is PyTorch's own, so that its output is always new memory."""
    return issubclass(kind, nn.Conv1d) and kind.forward.__module__.startswith("torch.")


def _as_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A single argument as itself, several as a tuple, named ones as a dict, both as a dict with ``args``."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return next(iter(kwargs.values())) if len(kwargs) == 1 else dict(kwargs)
    return {"args": args, "kwargs": dict(kwargs)} if "args" in kwargs else {"args": args, **kwargs}
