"""Puts hooks on modules, and takes them off: copies of a hooked module, and pickles of it, have hooks that do nothing."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# Note: [Hooks and copies]
# Assumption: deepcopy, pickle and torch.save copy a module's hook dictionaries with it.
# Failure: a plain function is copied by reference, so the copy would record into the original's block; a closure cannot
#   be pickled at all.
# Choice: a hook is a ``partial`` (called as fast as a function) whose copy and whose pickle is a standard-library
#   callable that takes anything and returns None, so that loading a pickle does not even need convtap. A shallow copy
#   shares the dictionaries themselves, so a hook also looks at the module it is called for.


class Hook(partial):  # type: ignore[type-arg]
    """A bound hook that turns into one that does nothing when it is copied. See Note: [Hooks and copies]."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


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
        module._forward_hooks[self._key] = Hook(function, *bound)
        if always or kwargs:
            self._flagged.append(module)
        if always:
            module._forward_hooks_always_called[self._key] = True
        if kwargs:
            module._forward_hooks_with_kwargs[self._key] = True

    def after_each(self, modules: Collection[nn.Module], function: Callable[..., Any]) -> None:
        """Calls ``function(module, args, output)`` after the forward of every module."""
        key, hook = self._key, Hook(function)
        self._after.extend(modules)  # first: see Note: [Interrupts]
        for module in modules:
            module._forward_hooks[key] = hook

    def before(self, module: nn.Module, function: Callable[..., Any], *bound: Any, first: bool = False) -> None:
        """Calls ``function(*bound, module, args, kwargs)`` before the module's forward.

        Args:
            first: before all other hooks that are there.
        """
        self._flagged.append(module)
        module._forward_pre_hooks[self._key] = Hook(function, *bound)
        if first:
            module._forward_pre_hooks.move_to_end(self._key, last=False)  # type: ignore[attr-defined]
        module._forward_pre_hooks_with_kwargs[self._key] = True

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
