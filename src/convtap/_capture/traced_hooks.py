"""The traceable hooks of a tapped module, which clone, reduce and cast values."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from convtap._errors import ConvtapError, InvalidType
from convtap._record.policy import Policy, cast
from convtap._result.keys import numbered, positions
from convtap._select.module_tree import is_kind
from convtap._select.selection import CONV1D
from convtap._taps.modules import as_input
from convtap._tensors.nested import MISSING, map_leaves, part_of

#: The paths of the parts to keep of a layer's value (empty for the whole value), each with its policy.
Parts: TypeAlias = "tuple[tuple[str, Policy], ...]"


class Sink(threading.local):
    """The values that this thread's forward pass has recorded so far.

    Attributes:
        calls: the name, the part and the value of each record, in order; None outside of a forward pass.
        running: the name and the module of each watched layer that is being called, outermost first.
    """

    # With class attributes, Dynamo would guard that no thread has set them, and then fail on its own guard.
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] | None = None
        self.running: list[tuple[str, nn.Module]] = []


def is_convolution(module: nn.Module) -> bool:
    """Returns whether a module is a 1-D convolution, which owns the one in its call."""
    return is_kind(module, CONV1D)


def enter(sink: Sink, name: str, parts: Parts, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Notes that a layer runs and records parts of its input. A forward pre-hook."""
    calls = sink.calls
    if calls is not None:
        sink.running.append((name, module))
        if parts:
            _keep(calls, name, parts, as_input(args, kwargs))


def leave(sink: Sink, name: str, parts: Parts, module: nn.Module, args: Any, output: Any) -> None:
    """Notes that a layer has run and records parts of its output. A forward hook.

    A convolution that raised has the output None.
    """
    calls = sink.calls
    if calls is not None:
        running = sink.running
        if running and running[-1][1] is module:
            running.pop()
        if output is not None or not is_convolution(module):
            _keep(calls, name, parts, output)


def _keep(calls: list[tuple[str, str, Any]], name: str, parts: Parts, value: Any) -> None:
    for part, policy in parts:
        found = part_of(value, part)
        if found is not MISSING:  # a missing part is an error of the whole forward pass
            calls.append((name, part, keep_value(found, name + part, policy)))


def keep_value(value: Any, name: str, policy: Policy) -> Any:
    """Applies the policy to a layer's output or input. Errors name the layer."""
    if not policy.transforms or torch.compiler.is_compiling():
        return map_leaves(lambda tensor: _transformed(tensor, policy), value)
    try:
        # Activation checkpointing counts the tensors that its own hooks save for backward, and its recomputation does not
        # run ``reduce``. Tensors that ``reduce`` saves must therefore not pass through these hooks.
        with saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            return map_leaves(lambda tensor: _transformed(tensor, policy), value)
    except Exception as error:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        text = str(error) if isinstance(error, ConvtapError) else f"reduce failed on the value{shape}: {error!r}"
        kind = type(error) if isinstance(error, ConvtapError) else ConvtapError
        raise kind(f"layer {name!r}: {text}") from error


def _transformed(tensor: Tensor, policy: Policy) -> Tensor:
    """Clones, reduces and casts a tensor.

    A compiler fuses plain clones. See Note: [Copy-on-write snapshots].
    """
    value = tensor.clone()
    if policy.reduce is not None:
        value = policy.reduce(value)
        if not isinstance(value, Tensor):
            raise InvalidType(
                f"reduce returned a {type(value).__name__}, which is not a tensor. "
                "Write for example reduce=lambda t: t.mean(-1)."
            )
    value = cast(value, policy.dtype)
    return value if policy.reduce is None else value.clone()  # reduce may return a small view of a large clone


def keyed(calls: list[tuple[str, str, Any]], separators: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values by key.

    A key is the layer's name, the number of the call if the layer ran several times, and the part.
    """
    found: dict[str, Any] = {}
    for (name, part, value), position in zip(calls, positions([name + part for name, part, _ in calls]), strict=True):
        found[numbered(name, *position, separators[name], part)] = value
    return found
