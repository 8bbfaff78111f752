"""Keeps outputs and inputs: unwraps them, applies the policy, moves them, and names the layer in errors."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from convtap._errors import ConvtapError, Unsupported
from convtap._offload.offloader import Offloader
from convtap._record.policy import Alias, Policy
from convtap._record.reductions import Reductions
from convtap._tensors.nested import Leaves
from convtap._tensors.snapshot import snapshot
from convtap._torch.hooks import Hooks
from convtap._torch.modes import outside_modes
from convtap._torch.transforms import is_wrapped, unwrapped


class _Busy(threading.local):
    """Whether this thread is inside the recording's own torch calls."""

    now = False


class Keeper:
    """Makes of what a tap saw what a call holds."""

    def __init__(self, policy: Policy, offloader: Offloader | None, reductions: Reductions | None = None) -> None:
        self.is_plain = policy.is_plain
        self._reductions = reductions
        self._of: dict[str, Keeper] = {}
        self.keeps_fakes = policy.keeps_fakes
        self.moves = offloader is not None
        self._policy = policy
        self._offloader = offloader
        self._busy = _Busy()

    @property
    def busy(self) -> bool:
        """Whether torch is called in this thread by the recording itself (by ``reduce``, say), and not by the model."""
        return self._busy.now

    def stays(self, tensors: Iterable[Tensor]) -> bool:
        """Whether what is kept of tensors stays on their device."""
        offloader = self._offloader
        return offloader is None or all(map(offloader.is_home, tensors))

    def input(self, name: str, value: Any) -> Any:
        """Returns what to hold of a layer's input."""
        keeper = self._for(name)
        return self._guarded(keeper, keeper._keep_input, name, Leaves(value))

    def output(self, name: str, output: Leaves, inputs: Any, fresh: bool, alone: bool) -> tuple[Any, Any]:
        """Returns what to hold of a layer's output, and what the model is to go on with instead (None: its own).

        Raises:
            ConvtapError: it cannot be kept, or ``reduce`` failed; the layer is named.
        """
        keeper = self._for(name)
        kept: tuple[Any, Any] = self._guarded(keeper, keeper._keep_output, name, output, inputs, fresh, alone)
        return kept

    def _for(self, name: str) -> Keeper:
        """Returns what keeps a layer's outputs: this one, but for its ``reduce`` if that differs between layers."""
        if self._reductions is None:
            return self
        if name not in self._of:
            policy = dataclasses.replace(self._policy, reduce=self._reductions.of(name))
            self._of[name] = Keeper(policy, self._offloader)
        return self._of[name]

    def _keep_input(self, value: Leaves) -> Any:
        return value.rebuild(map(self._moving(self._policy.keep_input), self._outside_transforms(value.tensors)))

    def _keep_output(self, output: Leaves, inputs: Any, fresh: bool, alone: bool) -> tuple[Any, Any]:
        policy = self._policy
        tensors = self._outside_transforms(output.tensors)
        if alone and fresh and policy.swaps(output, inputs) and self.stays(output.tensors):
            instead = output.rebuild(map(_replacement, output.tensors), other=_unchanged)
            _known.note(output.structure, instead, None)
            return output.rebuild(map(_kept_upstream, output.tensors)), instead
        keep = self._moving(lambda tensor: policy.keep_output(tensor, fresh))
        kept = output.rebuild(map(keep, tensors))
        _known.note(output.structure, None, kept)
        return kept, None

    def _guarded(self, keeper: Keeper, keep: Callable[..., Any], name: str, value: Leaves, *rest: Any) -> Any:
        """Runs what keeps a value, unseen by the taps; an error in it names the layer."""
        self._busy.now = True
        try:
            if keeper._policy.reduce is None:
                return keep(value, *rest)
            # Activation checkpointing counts the tensors that are saved for backward, and its recomputation does not
            # reduce: what ``reduce`` saves must not go through its hooks.
            with saved_tensors_hooks(Tensor.detach, _unchanged):
                return keep(value, *rest)
        except Exception as error:
            raise keeper._failed(name, value.structure, error) from error
        finally:
            self._busy.now = False

    def _moving(self, keep: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """What keeps a tensor and, where it is on another device, moves it."""
        offloader, policy = self._offloader, self._policy
        if offloader is None:
            return keep

        def kept(tensor: Tensor) -> Any:
            value = keep(tensor) if offloader.is_home(tensor) else policy.keep_moving(tensor, keep)
            return offloader.move(value) if isinstance(value, Tensor) else value

        return kept

    def _outside_transforms(self, tensors: list[Tensor]) -> list[Tensor]:
        """Unwraps what a torch.func transform has wrapped. See Note: [Tensors inside torch.func transforms]."""
        if not any(map(is_wrapped, tensors)):
            return tensors
        if not self._policy.detach:
            raise Unsupported(
                "detach=False does not work inside a torch.func transform (vmap, grad, jvp): its graph ends with the "
                "transform. Leave detach=True, or take gradients with torch.autograd.grad."
            )
        return [unwrapped(tensor) for tensor in tensors]

    def _failed(self, name: str, output: Any, error: Exception) -> ConvtapError:
        if isinstance(error, ConvtapError):
            return type(error)(f"layer {name!r}: {error}")
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        what = "reduce" if self._policy.reduce is not None else "keeping"
        return ConvtapError(f"layer {name!r}: {what} failed on the output{shape}: {type(error).__name__}: {error}")


def are_fake(tensors: Iterable[Tensor]) -> bool:
    """Whether a model is being traced with tensors that have no values (``torch.export``): there is nothing to record."""
    return any(type(tensor).__name__ in ("FakeTensor", "FunctionalTensor") for tensor in tensors)


def _unchanged(value: Any) -> Any:
    return value


def _kept_upstream(output: Tensor) -> Any:
    return Alias(output) if output.requires_grad else snapshot(output)


def _replacement(output: Tensor) -> Tensor:
    return snapshot(output) if output.requires_grad else output


# Note: [Who holds an output]
# Assumption: a layer returns its output to nobody but the caller, so that the caller may be given another tensor instead.
# Failure: a layer that keeps its last output, or a user's hook that does, would no longer have what the model works on.
# Choice: count the references to the output at the hook. The count without any other holder depends on Python and on
#   torch's way to call hooks, so it is measured once, on a module that keeps nothing. What another block's hook has just
#   given the model instead, torch still has in a variable of its own: that is one more. (To replace only what a plain
#   Conv1d without hooks of others returns needs no count, but loses the value of every convolution with weight
#   normalization, and of every class of the user's, in front of an in-place activation.)


class _Known(threading.local):
    """The references to one output that blocks of this library and torch itself are known to hold."""

    identity = 0
    aliases = 0
    replaced = False

    def count(self, output: Any) -> int:
        if self.identity != id(output):
            self.identity, self.aliases, self.replaced = id(output), 0, False
        return self.aliases + self.replaced

    def note(self, output: Any, replacement: Any, kept: Any) -> None:
        """Notes what a hook has just done: torch holds what it returned, and an alias holds the output."""
        self.replaced = replacement is not None
        if replacement is not None:
            self.identity, self.aliases = id(replacement), 0
        elif isinstance(kept, Alias) and kept.tensor is output:
            self.aliases += 1


_known = _Known()


def is_held_elsewhere(count: int, output: Any) -> bool:
    """Whether so many references to an output, counted in a hook, are more than there are if nobody keeps it."""
    if count > references() + _known.count(output):
        return True
    parts = output.values() if type(output) is dict else output if type(output) in (tuple, list) else ()
    return _most_references(parts) > _part_references()


def _most_references(parts: Iterable[Any]) -> int:
    return max((sys.getrefcount(part) for part in parts if isinstance(part, Tensor)), default=0)


@functools.cache
def _part_references() -> int:
    """How many references to a part of an output there are if only the output holds it: one fewer since Python 3.14."""
    return _most_references((torch.zeros(1),))


class _Probe(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class _Counter:
    count = 0

    def see(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.count = sys.getrefcount(output)


@functools.cache
def references() -> int:
    """How many references to an output there are in a hook if nobody keeps it. See Note: [Who holds an output]."""
    probe, counter, hooks = _Probe(), _Counter(), Hooks()
    hooks.after(probe, counter.see, "probe", probe, kwargs=True)
    with outside_modes():
        probe(torch.zeros(1))
    hooks.remove()
    return counter.count
