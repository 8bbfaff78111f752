"""Collects d(loss)/d(output) for each call by hooks on the output tensors."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convtap._errors import InvalidValue
from convtap._record.policy import cast, drops_imaginary_part
from convtap._result.gradient import Gradient
from convtap._tensors.memory import are_separate, tensor_bytes
from convtap._tensors.nested import Leaves, walk_tensors
from convtap._tensors.snapshot import snapshot
from convtap._torch.modes import backward_task, outside_function_modes
from convtap._torch.transforms import is_wrapped

# Note: [Where a gradient is read]
# Assumption: a hook on a tensor stays with that version of the tensor. An in-place activation after the layer makes a new
#   version, and the hook stays on the convolution's output. (A full backward hook on the module would make such an
#   activation raise.)
# Failure: this does not hold for a view, such as the output of an unbatched (C, T) convolution. An in-place operation gives
#   the view a new history, and the hook is never called.
# Choice: such an output is replaced by a copy-on-write snapshot, which is not a view and costs no memory, and the hook is
#   registered on the snapshot. An output that shares memory with an input or another output is not replaced, since the
#   model may depend on the shared memory.
#
# Note: [Reentrant checkpoints]
# Assumption: ``checkpoint(..., use_reentrant=True)`` runs its function without a graph, and again during the backward pass.
#   The gradients belong to the second run. Both runs have the same context object.
# Choice: the calls of the first run are listed under that object (by weak references), layer by layer. The n-th call of a
#   layer in the second run matches the n-th call in the list. A non-reentrant checkpoint keeps the graph of the first run
#   and does not need this.


_NO_GRAPH = (
    "its output does not require a gradient. Either the forward pass ran under torch.no_grad, or neither the input nor an "
    "earlier weight requires a gradient. Enable gradients, and if all weights are frozen, run the model on x.requires_grad_()"
)
_TRANSFORMED = (
    "it ran inside a torch.func transform (grad, vjp, vmap, …), which does not pass gradients to hooks. Call "
    "loss.backward() or torch.autograd.grad on the model itself"
)
_NO_RECOMPUTE = (
    "it ran inside checkpoint(..., use_reentrant=True), which builds the graph during the backward pass, but no backward "
    "pass ran inside the capture. Call loss.backward() inside the capture, or write use_reentrant=False"
)


class _Region:
    """The calls in one reentrant checkpoint, by layer and in order."""

    def __init__(self) -> None:
        self._gradients: dict[str, list[weakref.ref[Gradient]]] = {}
        self._positions: dict[str, int] = {}
        self._task = -1

    def add(self, name: str, gradient: Gradient) -> None:
        self._gradients.setdefault(name, []).append(weakref.ref(gradient))

    def next(self, name: str) -> Gradient | None:
        task = backward_task()
        if task != self._task:  # each backward pass through a retained graph runs the same region again
            self._task, self._positions = task, {}
        position = self._positions.get(name, 0)
        self._positions[name] = position + 1
        known = self._gradients.get(name, [])
        return known[position]() if position < len(known) else None


class Gradients:
    """Collects the gradients of a capture's outputs.

    Args:
        dtype: the dtype to cast the gradients to, or None.
        move: moves a kept gradient to its device.
    """

    def __init__(self, dtype: torch.dtype | None, move: Callable[[Any], Any]) -> None:
        self._dtype = dtype
        self._move = move
        self._regions: weakref.WeakKeyDictionary[Any, _Region] = weakref.WeakKeyDictionary()

    def follow(self, name: str, output: Leaves, inputs: Any, swapped: Any) -> tuple[Gradient, Any]:
        """Registers hooks for an output's gradient.

        Args:
            name: the layer.
            output: the layer's output.
            inputs: the layer's inputs.
            swapped: the replacement that the model already gets instead of the output, or None.

        Returns:
            The future gradient, and the replacement that the model gets instead of the output, or None.

        Raises:
            InvalidValue: if ``dtype`` would drop the imaginary part of a gradient.
        """
        tensors = [tensor for tensor in output.tensors if tensor.is_floating_point() or tensor.is_complex()]
        if any(map(is_wrapped, tensors)):
            return Gradient(output, 0, _TRANSFORMED), swapped
        if any(drops_imaginary_part(tensor, self._dtype) for tensor in tensors):
            raise InvalidValue(
                f"layer {name!r}: dtype={self._dtype} would drop the imaginary part of the gradient of its complex output. "
                "Pass a complex dtype, or remove grads=True."
            )
        size = sum(self._bytes(tensor) for tensor in tensors)
        if any(tensor.requires_grad for tensor in tensors):
            gradient = Gradient(output, size, None)
            if swapped is not None:
                self._listen(gradient, output, output.tensors)
                return gradient, swapped
            return gradient, self._listen_in_place(gradient, output, inputs)
        _, regions = _checkpoints()
        gradient = Gradient(output, size if regions else 0, _NO_RECOMPUTE if regions else _NO_GRAPH)
        self._list(name, gradient, regions)
        return gradient, None

    def recomputed(self, name: str, output: Leaves, inputs: Any) -> Any:
        """Collects the gradient of a recomputed output for the call that it repeats."""
        if backward_task() == -1:
            return None
        outer, regions = _checkpoints()
        region = None if outer is None else self._regions.get(outer)
        gradient = None if region is None else region.next(name)
        if gradient is None:
            return None
        self._list(name, gradient, regions)
        if not any(tensor.requires_grad for tensor in output.tensors):
            return None
        gradient.missing = None
        return self._listen_in_place(gradient, output, inputs)

    def _list(self, name: str, gradient: Gradient, regions: list[Any]) -> None:
        for context in regions:
            self._regions.setdefault(context, _Region()).add(name, gradient)

    def _listen_in_place(self, gradient: Gradient, output: Leaves, inputs: Any) -> Any:
        """Registers hooks on the tensors that the model continues with.

        See Note: [Where a gradient is read].
        """
        tensors = output.tensors
        given = {id(tensor): tensor for _, tensor in walk_tensors(inputs)}
        unstable = {
            id(tensor)
            for tensor in tensors
            if tensor.requires_grad and tensor._is_view() and are_separate([*tensors, *given.values()], [tensor])
        }
        if not unstable:
            self._listen(gradient, output, tensors)
            return None
        followed = [snapshot(tensor) if id(tensor) in unstable else tensor for tensor in tensors]
        self._listen(gradient, output, followed)
        return output.rebuild(followed, other=lambda value: value)

    def _listen(self, gradient: Gradient, output: Leaves, tensors: list[Tensor]) -> None:
        # The reference is weak, so the graph does not keep the capture's gradients alive.
        reference = weakref.ref(gradient)
        for path, tensor in zip(output.paths, tensors, strict=True):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._arrived, reference, path))  # type: ignore[no-untyped-call]

    def _arrived(self, reference: weakref.ref[Gradient], path: str, value: Tensor) -> None:
        gradient = reference()
        if gradient is None:
            return
        with torch.no_grad(), outside_function_modes():
            kept = cast(value.detach(), self._dtype)
            gradient.put(path, self._move(snapshot(kept)))

    def _bytes(self, tensor: Tensor) -> int:
        return tensor_bytes(tensor) if self._dtype is None else tensor.numel() * self._dtype.itemsize


def _checkpoints() -> tuple[Any, list[Any]]:
    """Returns the running reentrant checkpoints.

    These are the checkpoint that recomputes its forward, or None, and the checkpoints inside it that run theirs first.
    """
    begun: list[Any] = []
    # A model with checkpoints has imported the module. convtap does not, since that takes 0.3 s on torch 2.6.
    function = getattr(sys.modules.get("torch.utils.checkpoint"), "CheckpointFunction", None)
    if function is None:
        return None, begun
    forward, backward = function.forward.__code__, function.backward.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is forward:
            begun.append(frame.f_locals["ctx"])
        elif frame.f_code is backward:
            return frame.f_locals["ctx"], begun
        frame = frame.f_back  # type: ignore[assignment]
    return None, begun
