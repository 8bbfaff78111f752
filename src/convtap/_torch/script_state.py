"""Reads and sets the attributes of a scripted module, which live in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def script_state(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Returns a scripted module's own attributes, parameters and buffers."""
    found: dict[str, Any] = dict(module.named_parameters(recurse=False))
    inner: Any = module._c
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(inner._type())
    for name in kind.get_attributes():
        try:
            found[name] = inner.getattr(name)
        except RuntimeError:  # a C++ value that has no Python form
            continue
    return found


def set_script_state(module: torch.jit.ScriptModule, state: dict[str, Any]) -> None:
    """Sets the attributes of a scripted module that differ from ``state``."""
    inner: Any = module._c
    for name, value in state.items():
        if not _is_same(inner.getattr(name), value):
            inner.setattr(name, value)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(map(_is_same, one.values(), other.values()))
    return one is other or (type(one) is type(other) and bool(one == other))
