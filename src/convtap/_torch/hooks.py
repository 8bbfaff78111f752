"""Registers and removes module hooks, which do nothing in copies of the module."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

# Note: [Hooks and copies]
# Assumption: deepcopy, pickle and torch.save copy a module's hook dictionaries with it.
# Failure: a plain function is copied by reference, so the copy of a model would record into the original's capture. A
#   closure cannot be pickled.
# Choice: a hook is a ``partial``, which is as fast as a function. Its copy, or its pickle, is a callable of the standard
#   library that takes any arguments and returns None, so loading a pickle does not need convtap. A shallow copy shares the
#   dictionaries themselves, so a hook also checks the module that it is called for.


def has_global_hooks() -> bool:
    """Returns whether torch has global hooks, which run for every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class Hook(partial):  # type: ignore[type-arg]
    """A bound hook whose copies do nothing. See Note: [Hooks and copies]."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


# Note: [Two moments]
# Assumption: torch looks up a hook first, and later looks up whether the hook takes keyword arguments.
# Failure: if another thread registers or removes the hook in between, the hook is called without keyword arguments.
# Choice: such a hook is called through a function that accepts both forms.


def _call_after(function: Callable[..., Any], bound: tuple[Any, ...], module: nn.Module, args: Any, *rest: Any) -> Any:
    return function(*bound, module, args, rest[0] if len(rest) > 1 else {}, rest[-1])


def _call_before(
    function: Callable[..., Any], bound: tuple[Any, ...], module: nn.Module, args: Any, kwargs: Any = None
) -> Any:
    return function(*bound, module, args, {} if kwargs is None else kwargs)


class Hooks:
    """The hooks of one owner, all under one key."""

    def __init__(self) -> None:
        # The number comes from torch's own sequence, so no other hook has it. Registering each hook through
        # ``register_forward_hook`` would cost as much as the rest of a capture.
        self._key = RemovableHandle(OrderedDict()).id
        self._after: list[nn.Module] = []
        self._flagged: list[nn.Module] = []

    def after(
        self, module: nn.Module, function: Callable[..., Any], *bound: Any, always: bool = False, kwargs: bool = False
    ) -> None:
        """Calls ``function(*bound, module, args, output)`` after the module's forward.

        Args:
            always: whether to call it also if the forward raises an Exception.
            kwargs: whether to call ``function(*bound, module, args, kwargs, output)``.
        """
        self._after.append(module)
        if always or kwargs:
            self._flagged.append(module)
        if always:
            module._forward_hooks_always_called[self._key] = True
        if kwargs:
            module._forward_hooks_with_kwargs[self._key] = True
        hook = Hook(_call_after, function, bound) if kwargs else Hook(function, *bound)
        module._forward_hooks[self._key] = hook

    def before(self, module: nn.Module, function: Callable[..., Any], *bound: Any) -> None:
        """Calls ``function(*bound, module, args, kwargs)`` before the module's forward."""
        self._flagged.append(module)
        module._forward_pre_hooks_with_kwargs[self._key] = True
        module._forward_pre_hooks[self._key] = Hook(_call_before, function, bound)

    def are_on(self, module: nn.Module) -> bool:
        """Returns whether a module has an active hook of this owner."""
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        return any(isinstance(known.get(self._key), Hook) for known in hooks)

    def remove(self) -> None:
        """Removes all hooks. A second call does nothing."""
        key = self._key
        for module in self._after:
            module._forward_hooks.pop(key, None)
        for module in self._flagged:
            module._forward_pre_hooks.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        self._after.clear()
        self._flagged.clear()
