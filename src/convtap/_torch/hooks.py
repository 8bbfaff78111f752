"""Registers and removes module hooks; in copies and pickles of a hooked module they do nothing."""

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
# Failure: a plain function is copied by reference, so the copy would record into the original's block; a closure cannot
#   be pickled at all.
# Choice: a hook is a ``partial`` (called as fast as a function) whose copy and whose pickle is a standard-library
#   callable that takes anything and returns None, so that loading a pickle does not even need convtap. A shallow copy
#   shares the dictionaries themselves, so a hook also looks at the module it is called for.


def has_global_hooks() -> bool:
    """Whether hooks run around the forward of every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class Hook(partial):  # type: ignore[type-arg]
    """A bound hook that turns into one that does nothing when it is copied. See Note: [Hooks and copies]."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


# Note: [Two moments]
# Assumption: torch looks up a hook at one moment, and at a later one whether it wants the keyword arguments.
# Failure: when another thread registers or removes the hook in between, the hook is called without them.
# Choice: a hook that wants them is called through a function that takes what comes.


def _call_after(function: Callable[..., Any], bound: tuple[Any, ...], module: nn.Module, args: Any, *rest: Any) -> Any:
    return function(*bound, module, args, rest[0] if len(rest) > 1 else {}, rest[-1])


def _call_before(
    function: Callable[..., Any], bound: tuple[Any, ...], module: nn.Module, args: Any, kwargs: Any = None
) -> Any:
    return function(*bound, module, args, {} if kwargs is None else kwargs)


class Hooks:
    """The hooks of one owner, all under one key; ``remove`` takes all of them off."""

    def __init__(self) -> None:
        # One number of torch's own sequence, so that no other hook has it. Registering each hook through
        # ``register_forward_hook`` costs as much as all the rest of a block.
        self._key = RemovableHandle(OrderedDict()).id
        self._after: list[nn.Module] = []
        self._flagged: list[nn.Module] = []

    def after(
        self, module: nn.Module, function: Callable[..., Any], *bound: Any, always: bool = False, kwargs: bool = False
    ) -> None:
        """Calls ``function(*bound, module, args, output)`` after the module's forward.

        Args:
            always: also if the forward raises an Exception.
            kwargs: call ``function(*bound, module, args, kwargs, output)``.
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
        """Returns whether a module has a hook of this owner that has a function to call."""
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        return any(isinstance(known.get(self._key), Hook) for known in hooks)

    def remove(self) -> None:
        """Takes every hook off its module; again does nothing."""
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
