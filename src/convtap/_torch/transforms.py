"""Unwraps the tensors of ``torch.func`` transforms, so that they outlive the transform."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Note: [Tensors inside torch.func transforms]
# Assumption: under vmap, grad or jvp the output at a hook is a wrapper, one a level, around a tensor of the whole batch.
# Failure: a wrapper dies with its level, and reading it later raises or gives nonsense.
# Choice: unwrap every level, and put a batched level's axis first, so that nested vmaps give (outer, inner, C, T).

is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """Returns the tensor of the whole batch that is inside all wrappers."""
    while is_wrapped(tensor):
        functorch = torch._C._functorch
        axis = functorch.maybe_get_bdim(tensor) if functorch.is_batchedtensor(tensor) else 0
        tensor = functorch.get_unwrapped(tensor)
        if axis:
            tensor = tensor.movedim(axis, 0)
    return tensor


def outside_transforms() -> AbstractContextManager[object]:
    """Runs convtap's own torch calls outside of all ``torch.func`` transforms, which refuse to write into other tensors."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()
