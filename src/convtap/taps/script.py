"""Taps TorchScript: the convolutions of scripted and traced modules, which call no Python hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convtap._owners import Owners
from convtap._passes import Passes
from convtap._record import Recorder
from convtap._select import FUNCTION, Selection
from convtap._torch import modes
from convtap._torch.call_stack import module_calls

_aten = torch.ops.aten

#: The operators that TorchScript runs a convolution with, and which argument says that it is transposed.
_OPERATORS: dict[Any, int | None] = {
    _aten.conv1d.default: None,
    _aten.conv1d.padding: None,
    _aten.convolution.default: 6,
    _aten._convolution.default: 6,
    _aten._convolution.deprecated: 6,
}


class ScriptTap:
    """Emits the convolutions that run inside TorchScript, named after the owner of their weight.

    Values here lie below autograd, so they have no graph; and no Python exception passes through TorchScript unchanged.
    """

    def __init__(
        self, selection: Selection, recorder: Recorder, passes: Passes, token: modes.Token, *, at: str
    ) -> None:
        self._selection = selection
        self._recorder = recorder
        self._passes = passes
        self._token = token
        self._at = at
        self._owners = Owners(selection.tree)
        self._thread: int | None = None

    def open(self) -> None:
        """Begins to watch this thread's operators."""
        self._thread = threading.get_ident()
        modes.operators.begin(self._token, self._watch)

    def close(self) -> None:
        """Ends it."""
        if self._thread is not None:
            modes.operators.end(self._token, self._thread)

    def _watch(self, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in _OPERATORS or self._recorder.muted or not self._is_script():
            return call(*args, **kwargs)
        name = self._name(func, args)
        if name is None:
            return call(*args, **kwargs)
        if self._at == "input":
            self._recorder.emit_input(name, args[0], "script")
            return call(*args, **kwargs)
        output = call(*args, **kwargs)
        self._recorder.emit(name, output, "script")
        return output

    def _is_script(self) -> bool:
        """Whether the innermost module that Python called is a scripted one: else another tap sees the convolution."""
        module = next((module for module, _ in module_calls()), None)
        return isinstance(module, torch.jit.ScriptModule)

    def _name(self, func: Any, args: tuple[Any, ...]) -> str | None:
        weight = args[1]
        transposed = _OPERATORS[func]
        if not isinstance(weight, Tensor) or weight.dim() != 3 or (transposed is not None and args[transposed]):
            return None
        name = self._owners.find(weight, self._passes.number)
        if name is None:
            if not self._passes.in_forward():
                return None
            name = FUNCTION
        return name if self._selection.wants(name) else None
