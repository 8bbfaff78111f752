"""Independent references: what a person would write by hand, with a clone of everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cloned(value: Any) -> Any:
    """A deep copy of tensors in tuples, lists and dicts; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(cloned(item) for item in value)
    if isinstance(value, dict):
        return {key: cloned(item) for key, item in value.items()}
    return value


@contextmanager
def cloning_hooks(model: nn.Module, types: Any = nn.Conv1d) -> Iterator[list[tuple[str, Any]]]:
    """Records (name, clone of the output) of every module of some types, by torch's public hooks."""
    seen: list[tuple[str, Any]] = []

    def hook(name: str) -> Any:
        return lambda module, args, output: seen.append((name, cloned(output)))

    handles = [
        module.register_forward_hook(hook(name or "(root)"))
        for name, module in model.named_modules()
        if isinstance(module, types)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def patched_conv1d() -> Iterator[list[Tensor]]:
    """Records a clone of the result of every ``F.conv1d`` call, by replacing the function."""
    seen: list[Tensor] = []
    original = F.conv1d

    def conv1d(*args: Any, **kwargs: Any) -> Tensor:
        output = original(*args, **kwargs)
        seen.append(output.detach().clone())
        return output

    F.conv1d = conv1d
    try:
        yield seen
    finally:
        F.conv1d = original


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality of structures of tensors (NaN equal to NaN)."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = a.detach(), b.detach()
        return bool(torch.equal(a, b) or ((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b)


def snapshot_of(model: nn.Module) -> list[Any]:
    """Everything that a block must leave as it was: each module's ``__dict__`` entries and hook dictionaries."""
    found = []
    for name, module in model.named_modules():
        state = {
            key: (list(value.items()) if key.endswith(("hooks", "kwargs", "called")) else None)
            for key, value in module.__dict__.items()
        }
        found.append((name, type(module), module.training, sorted(module.__dict__), state))
    return found
