"""Keeps outputs and inputs: unwraps them, applies the policy, and moves them."""

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
    """Whether this thread is inside convtap's own torch calls."""

    now = False


class Keeper:
    """Turns a value from a tap into the value that a call holds."""

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
        """Whether convtap itself, for example ``reduce``, calls torch in this thread."""
        return self._busy.now

    def stays(self, tensors: Iterable[Tensor]) -> bool:
        """Returns whether the kept tensors stay on their device."""
        offloader = self._offloader
        return offloader is None or all(map(offloader.is_home, tensors))

    def input(self, name: str, value: Any) -> Any:
        """Returns the value to hold for a layer's input."""
        keeper = self._for(name)
        return self._guarded(keeper, keeper._keep_input, name, Leaves(value))

    def output(self, name: str, output: Leaves, inputs: Any, fresh: bool, alone: bool) -> tuple[Any, Any]:
        """Returns the value to hold for a layer's output, and a replacement for the model.

        The replacement is None if the model keeps its own output.

        Raises:
            ConvtapError: if the output cannot be kept, or ``reduce`` failed. The error names the layer.
        """
        keeper = self._for(name)
        kept: tuple[Any, Any] = self._guarded(keeper, keeper._keep_output, name, output, inputs, fresh, alone)
        return kept

    def _for(self, name: str) -> Keeper:
        """Returns the keeper of a layer, which has the layer's own ``reduce``."""
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
        """Keeps a value while the taps ignore this thread. Errors name the layer."""
        self._busy.now = True
        try:
            if keeper._policy.reduce is None:
                return keep(value, *rest)
            # Activation checkpointing counts the tensors that are saved for backward, and its recomputation does not call
            # ``reduce``. Tensors that ``reduce`` saves must therefore not pass through its hooks.
            with saved_tensors_hooks(Tensor.detach, _unchanged):
                return keep(value, *rest)
        except Exception as error:
            raise keeper._failed(name, value.structure, error) from error
        finally:
            self._busy.now = False

    def _moving(self, keep: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Returns a function that keeps a tensor and moves it to the offload device."""
        offloader, policy = self._offloader, self._policy
        if offloader is None:
            return keep

        def kept(tensor: Tensor) -> Any:
            value = keep(tensor) if offloader.is_home(tensor) else policy.keep_moving(tensor, keep)
            return offloader.move(value) if isinstance(value, Tensor) else value

        return kept

    def _outside_transforms(self, tensors: list[Tensor]) -> list[Tensor]:
        """Unwraps the tensors of a torch.func transform.

        See Note: [Tensors inside torch.func transforms].
        """
        if not any(map(is_wrapped, tensors)):
            return tensors
        if not self._policy.detach:
            raise Unsupported(
                "detach=False does not work inside a torch.func transform (vmap, grad, jvp), because the graph ends with the "
                "transform. Use detach=True, or compute gradients with torch.autograd.grad."
            )
        return [unwrapped(tensor) for tensor in tensors]

    def _failed(self, name: str, output: Any, error: Exception) -> ConvtapError:
        if isinstance(error, ConvtapError):
            return type(error)(f"layer {name!r}: {error}")
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        what = "reduce" if self._policy.reduce is not None else "recording"
        return ConvtapError(f"layer {name!r}: {what} failed on the output{shape}: {type(error).__name__}: {error}")


def are_fake(tensors: Iterable[Tensor]) -> bool:
    """Returns whether tensors have no values, as in a ``torch.export`` trace."""
    return any(type(tensor).__name__ in ("FakeTensor", "FunctionalTensor") for tensor in tensors)


def _unchanged(value: Any) -> Any:
    return value


def _kept_upstream(output: Tensor) -> Any:
    return Alias(output) if output.requires_grad else snapshot(output)


def _replacement(output: Tensor) -> Tensor:
    return snapshot(output) if output.requires_grad else output


# Note: [Who holds an output]
# Assumption: only the caller of a layer holds the layer's output, so the caller can get another tensor instead.
# Failure: if the layer or a user's hook keeps the output, it would no longer have the tensor that the model works on.
# Choice: convtap counts the references to the output in the hook. The count without another holder depends on Python and on
#   torch's way of calling hooks, so it is measured once, on a module that keeps nothing. If another capture's hook has just
#   replaced the output, torch still holds the original in a variable, which is one more reference. (Replacing only the
#   output of a plain Conv1d without other hooks needs no count. But before an in-place activation, it loses the value of
#   every convolution with weight normalization, and of every class of the user.)


class _Known(threading.local):
    """The known references to one output, held by captures and by torch."""

    identity = 0
    aliases = 0
    replaced = False

    def count(self, output: Any) -> int:
        if self.identity != id(output):
            self.identity, self.aliases, self.replaced = id(output), 0, False
        return self.aliases + self.replaced

    def note(self, output: Any, replacement: Any, kept: Any) -> None:
        """Notes the references that a hook has just added.

        Torch holds the hook's return value, and an alias holds the output.
        """
        self.replaced = replacement is not None
        if replacement is not None:
            self.identity, self.aliases = id(replacement), 0
        elif isinstance(kept, Alias) and kept.tensor is output:
            self.aliases += 1


_known = _Known()


def is_held_elsewhere(count: int, output: Any) -> bool:
    """Returns whether something else than the caller keeps an output.

    Args:
        count: the number of references to the output, counted in a hook.
        output: the output.
    """
    if count > references() + _known.count(output):
        return True
    parts = output.values() if type(output) is dict else output if type(output) in (tuple, list) else ()
    return _most_references(parts) > _part_references()


def _most_references(parts: Iterable[Any]) -> int:
    return max((sys.getrefcount(part) for part in parts if isinstance(part, Tensor)), default=0)


@functools.cache
def _part_references() -> int:
    """Returns the reference count of a part of an output that only the output holds.

    Since Python 3.14 it is lower by one.
    """
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
    """Returns the number of references to an output in a hook if nothing keeps it.

    See Note: [Who holds an output].
    """
    probe, counter, hooks = _Probe(), _Counter(), Hooks()
    hooks.after(probe, counter.see, "probe", probe, kwargs=True)
    with outside_modes():
        probe(torch.zeros(1))
    hooks.remove()
    return counter.count
