"""The hooks of a tapped module and what they write: clones, reduced and cast, all of it traceable."""

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

#: The paths of the parts that are kept of a layer (empty for all of it), and what to do with each.
Parts: TypeAlias = "tuple[tuple[str, Policy], ...]"


class Sink(threading.local):
    """What the layers gave so far in the forward that runs in this thread, in order; None while none runs.

    ``running`` holds the name and the module of each watched layer that is being called, outermost first.
    """

    # As a class attribute, Dynamo would guard that no thread has it yet, and then fail on its own guard.
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] | None = None
        self.running: list[tuple[str, nn.Module]] = []


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a 1-D convolution, so that the convolution in its call is its own."""
    return is_kind(module, CONV1D)


def enter(sink: Sink, name: str, parts: Parts, module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward pre-hook: notes that the layer runs, and keeps parts of its input."""
    calls = sink.calls
    if calls is not None:
        sink.running.append((name, module))
        if parts:
            _keep(calls, name, parts, as_input(args, kwargs))


def leave(sink: Sink, name: str, parts: Parts, module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: notes that the layer has run, and keeps parts of its output.

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
        if found is not MISSING:  # what does not come out is an error of the whole forward
            calls.append((name, part, keep_value(found, name + part, policy)))


def keep_value(value: Any, name: str, policy: Policy) -> Any:
    """Applies the policy to what a layer gave or is given; an error in it names the layer."""
    if not policy.transforms or torch.compiler.is_compiling():
        return map_leaves(lambda tensor: _transformed(tensor, policy), value)
    try:
        # Activation checkpointing counts the tensors saved for backward through its own hooks, and its recomputation
        # does not reduce: what ``reduce`` saves must not go through them.
        with saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            return map_leaves(lambda tensor: _transformed(tensor, policy), value)
    except Exception as error:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        text = str(error) if isinstance(error, ConvtapError) else f"reduce failed on the value{shape}: {error!r}"
        kind = type(error) if isinstance(error, ConvtapError) else ConvtapError
        raise kind(f"layer {name!r}: {text}") from error


def _transformed(tensor: Tensor, policy: Policy) -> Tensor:
    """Clones, reduces and casts. Plain clones, which a compiler fuses; see Note: [Copy-on-write snapshots]."""
    value = tensor.clone()
    if policy.reduce is not None:
        value = policy.reduce(value)
        if not isinstance(value, Tensor):
            raise InvalidType(
                f"reduce returned a {type(value).__name__}, and it must return a tensor. "
                "Write for example reduce=lambda t: t.mean(-1)."
            )
    value = cast(value, policy.dtype)
    return value if policy.reduce is None else value.clone()  # reduce may return a small view of a large clone


def keyed(calls: list[tuple[str, str, Any]], separators: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values by key: the layer's name, with the number of the call if it ran several times, then the part."""
    found: dict[str, Any] = {}
    for (name, part, value), position in zip(calls, positions([name + part for name, part, _ in calls]), strict=True):
        found[numbered(name, *position, separators[name], part)] = value
    return found
