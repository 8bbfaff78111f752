"""Restores the state of a model, and of random numbers, after a forward pass."""

from __future__ import annotations

import copy
import math
import random
import sys
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from convtap._errors import listed, warn_user
from convtap._select.restore import (
    Memory,
    is_of_the_model,
    methods,
    restore_class,
    restore_dict,
    restore_gradient,
    restore_items,
    restore_members,
    restore_parameters,
    restore_slot,
    restore_some,
    restore_tensor,
    restore_values,
)
from convtap._tensors.memory import has_no_values, parts
from convtap._torch.cleanup import undone
from convtap._torch.random_state import random_state, set_random_state
from convtap._torch.script_state import script_state, set_script_state
from convtap._torch.storage import storage_number

# Note: [Looking at a model]
# Assumption: all state that a forward pass changes can be reached from the model's modules: from their attributes, and from
#   the containers and objects in them.
# Failure: a forward pass changes the caches of a streaming model, the ranges of a quantizer, and the class of a lazy module.
#   A deep copy of the model would need memory for all weights, and many models cannot be copied.
# Choice: convtap notes the items of all reachable objects by reference, and copies the memory of tensors. After the pass it
#   restores the items and the memory that differ. Forward passes hardly ever write to large parameters, so only their sums
#   are kept. If a sum differs, a warning names the parameter. Functions are not followed, nor are objects of the standard
#   library, of torch, and of convtap (an open capture).

#: The most bytes of parameters, and of other tensors, that are copied.
PARAMETERS = 16 * 2**20
OTHERS = 2 * 2**30

_ATOMS = (
    *(str, bytes, int, float, complex, type(None), type, Enum),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device),
)
_OPAQUE = ("builtins", "torch", "numpy", "convtap", *sys.stdlib_module_names)
_OTHERS = (torch.optim.Optimizer, torch.utils.data.Dataset)


@contextmanager
def untouched(model: nn.Module, *, everything: bool = False) -> Iterator[None]:
    """A context that restores a model and the random-number states on exit.

    It warns about changes that it cannot restore.

    Args:
        model: any PyTorch model.
        everything: whether to copy parameters of any size.
    """
    lost: list[str] = []
    # torch's own no_grad, which an interrupt can strike, may leave the gradients off
    steps: list[Callable[[], object]] = [partial(torch.set_grad_enabled, torch.is_grad_enabled())]
    try:
        with undone(steps):
            state, numpy = _State(model, everything), sys.modules.get("numpy")
            steps.append(lambda: lost.extend(state.restore()))
            steps.append(partial(random.setstate, random.getstate()))
            steps.append(partial(set_random_state, random_state()))
            if numpy is not None:
                steps.append(partial(numpy.random.set_state, numpy.random.get_state()))
            yield
    finally:
        if lost:
            warn_user(
                f"the forward pass changed {listed(lost)} of the {type(model).__name__}, and convtap could not restore it. "
                "Load the model again, and pass a copy, copy.deepcopy(model), next time.",
                UserWarning,
            )


class _State:
    """The state of a model, with functions that restore it."""

    def __init__(self, model: nn.Module, everything: bool) -> None:
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._memory: dict[int, Memory] = {}
        self._seen: dict[int, Any] = {}
        self._sharded = any("fsdp" in base.__module__ for part in model.modules() for base in type(part).__mro__)
        stack: list[tuple[str, Any]] = [("", model)]
        while stack:
            name, value = stack.pop()
            if id(value) in self._seen or isinstance(value, _ATOMS) or _is_ours(value):
                continue
            self._seen[id(value)] = value
            stack.extend(reversed(list(self._note(name, value))))
        budgets = {True: math.inf if everything else PARAMETERS, False: math.inf if everything else OTHERS}
        with torch.no_grad():
            for memory in self._memory.values():
                memory.note(budgets)

    def restore(self) -> list[str]:
        """Restores the state. Returns the names of the parts that it could not restore."""
        lost: list[str] = []
        for name, undo in self._undo:
            try:
                undo()
            except Exception as error:
                lost.append(f"{name} ({type(error).__name__})")
        with torch.no_grad():
            for memory in self._memory.values():
                try:
                    lost += memory.restore()
                except Exception as error:
                    lost.append(f"{memory.name} ({type(error).__name__})")
        return list(dict.fromkeys(lost))

    def _note(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Notes the state of one object. Yields the objects inside it."""
        if isinstance(value, Tensor):
            yield from self._tensor(name, value)
        elif isinstance(value, nn.Module):
            yield from self._module(name, value)
        elif isinstance(value, dict):
            self._later(name, restore_dict, value, dict(dict.items(value)), methods(value))
            yield from ((_item(name, key), item) for key, item in dict.items(value))
        elif isinstance(value, (list, deque)):
            items = list(value)
            self._later(name, restore_items, value, items)
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(items))
        elif isinstance(value, set):
            self._later(name, restore_members, value, set(value))
        elif isinstance(value, tuple):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, types.MethodType):
            yield name, value.__self__
        elif isinstance(value, partial):
            yield from ((name, item) for item in (value.func, value.args, value.keywords))
        else:
            self._generator_or_array(name, value)
        if not isinstance(value, (nn.Module, Tensor)) and _is_followed(value):
            yield from self._attributes(name, value)

    def _later(self, name: str, undo: Callable[..., object], *bound: Any) -> None:
        self._undo.append((name, partial(undo, *bound)))

    # -- modules and other objects

    def _module(self, name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        if isinstance(module, torch.jit.ScriptModule):
            found = script_state(module)
            self._later(name, set_script_state, module, found)
            yield from ((_join(name, key), item) for key, item in found.items())
            yield from ((_join(name, key), child) for key, child in module.named_children())
            return
        own = vars(module)
        for key in ("_modules", "_parameters", "_buffers"):
            yield from ((_join(name, part), item) for part, item in dict.items(own[key]))
            self._seen[id(own[key])] = own[key]
        if type(module).__module__.startswith(("torch.distributed", "torch.nn.parallel", "torch._dynamo")):
            return  # these wrappers manage their own state
        self._later(name, restore_class, module, type(module))
        for key in ("_modules", "_buffers"):
            self._later(name, restore_dict, own[key], dict(own[key]))
        if not self._sharded:  # FSDP replaces parameters itself
            self._later(name, restore_parameters, module, dict(dict.items(own["_parameters"])))
        yield from self._attributes(name, module)

    def _attributes(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            items = {key: item for key, item in own.items() if is_of_the_model(key)}
            if self._sharded and isinstance(value, nn.Module):
                items = {key: item for key, item in items.items() if not isinstance(item, Tensor)}
                self._later(name, restore_some, own, items)
            else:
                self._later(name, restore_dict, own, items)
            yield from ((_join(name, key), item) for key, item in own.items())
        slots = {slot for base in type(value).__mro__ for slot in _slots(base) if hasattr(value, slot)}
        for slot in slots - {"__dict__", "__weakref__"}:
            item = getattr(value, slot)
            self._later(_join(name, slot), restore_slot, value, slot, item)
            yield _join(name, slot), item

    def _generator_or_array(self, name: str, value: Any) -> None:
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            self._later(name, value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self._later(name, value.setstate, value.getstate())
        elif isinstance(value, bytearray):
            self._later(name, restore_items, value, bytes(value))
        elif numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind != "O":
            self._later(name, restore_values, value, value.copy())
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            self._later(name, value.set_state, value.get_state())
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            self._later(name, setattr, bits, "state", copy.deepcopy(bits.state))

    # -- tensors

    def _tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
        is_parameter = isinstance(tensor, nn.Parameter)
        lazy = isinstance(tensor, (UninitializedParameter, UninitializedBuffer))
        if not lazy and has_no_values(tensor) and not tensor.is_meta:
            return  # a fake tensor
        inner = [tensor] if lazy else parts(tensor)
        if inner[0] is tensor or type(tensor) in (Tensor, nn.Parameter):
            kind = type(tensor) if lazy else None
            self._later(name, restore_tensor, tensor, kind, tensor.data, tensor.requires_grad)
        for part in inner if not lazy else []:
            self._remember(name, part, is_parameter)
        if tensor.is_leaf:
            self._later(name, restore_gradient, tensor, tensor.grad)
            if tensor.grad is not None:
                self._remember(f"{name}.grad", tensor.grad, True)
        if hasattr(tensor, "__dict__"):
            yield from self._attributes(name, tensor)

    def _remember(self, name: str, tensor: Tensor, is_parameter: bool) -> None:
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return  # a forward pass does not write to mkldnn tensors
        if self._sharded and is_parameter:
            return
        if storage.device.type != "meta" and storage.nbytes():
            known = self._memory.setdefault(storage_number(tensor), Memory(name, storage))
            known.is_parameter |= is_parameter


# -- names


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _item(name: str, key: Any) -> str:
    return f"{name}[{key!r}]"


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_ours(value: Any) -> bool:
    """Returns whether an object belongs to convtap, as those of an open capture do."""
    return type(value).__module__.startswith("convtap.") and not isinstance(value, nn.Module)


def _is_followed(value: Any) -> bool:
    """Returns whether an object's attributes belong to the model.

    That is the case for an object of a user's class, and for a plain namespace.
    """
    if isinstance(value, (types.SimpleNamespace, UserDict, UserList)):
        return True
    return type(value).__module__.partition(".")[0] not in _OPAQUE and not isinstance(value, _OTHERS)
