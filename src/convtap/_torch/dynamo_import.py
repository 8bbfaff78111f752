"""Runs functions when Dynamo is imported, without importing it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from convtap._torch.lock import Lock

DYNAMO = "torch._dynamo"

_lock = Lock()
_actions: dict[object, Callable[[], None]] = {}


def then(who: object, action: Callable[[], None]) -> None:
    """Registers an action that runs after Dynamo is imported."""
    with _lock:
        _actions[who] = action
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)


def never_mind(who: object) -> None:
    """Removes an owner's action. A second call does nothing. See Note: [Interrupts]."""
    with _lock:
        _actions.pop(who, None)
        if not _actions and _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != DYNAMO:
            return None
        with _lock:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader)
        return spec


_FINDER = _Finder()


def _run_after(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        for action in tuple(_actions.values()):
            action()

    loader.exec_module = exec_module
