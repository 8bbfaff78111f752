"""Unwraps the tensors of ``torch.func`` transforms, so they outlive the transform."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Note: [Tensors inside torch.func transforms]
# Assumption: under vmap, grad or jvp a layer's output is a wrapper, one per level, around a tensor of the whole batch.
# Failure: a wrapper dies with its level. Reading it later raises an error or returns wrong values.
# Choice: unwrap every level, and move the axis of a batched level to the front. Nested vmaps result in (outer, inner, C, T).

is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """Returns the tensor of the whole batch inside all wrappers."""
    while is_wrapped(tensor):
        functorch = torch._C._functorch
        axis = functorch.maybe_get_bdim(tensor) if functorch.is_batchedtensor(tensor) else 0
        tensor = functorch.get_unwrapped(tensor)
        if axis:
            tensor = tensor.movedim(axis, 0)
    return tensor


def outside_transforms() -> AbstractContextManager[object]:
    """A context for convtap's own torch calls, outside of ``torch.func`` transforms.

    A transform refuses to write into tensors that it does not own.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()
