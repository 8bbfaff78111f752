"""Makes copies of tensors: copy-on-write if torch supports it, otherwise clones."""

from __future__ import annotations

import torch
from torch import Tensor

from convtap._tensors.memory import memory_of, tensor_bytes
from convtap._torch.storage import lazy_clone

# Note: [Copy-on-write snapshots]
# Assumption: a copy-on-write clone (see Note: [Copy-on-write clones]) works for an ordinary tensor.
# Failure: it does not work for every tensor. A quantized tensor crashes the process later. Nested, sparse and mkldnn tensors
#   raise, as do tensors in memory that torch did not allocate (``torch.from_numpy``). Dynamo cannot trace it, so traced code
#   (``tapped``) uses ``clone``.
# Choice: an allow-list (exactly ``torch.Tensor``, strided, not quantized, not nested), and ``clone`` for all other tensors.

_strided = torch.strided


def snapshot(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor that later writes to the tensor do not change."""
    if type(tensor) is Tensor and tensor.layout is _strided and not (tensor.is_quantized or tensor.is_nested):
        try:
            return lazy_clone(tensor)
        except RuntimeError:  # torch did not allocate the memory
            pass
    return tensor.clone()


def snapshot_of_result(output: Tensor) -> Tensor:
    """Returns a detached snapshot of a plain convolution's output.

    It skips the checks of ``snapshot``, since other layouts are rare here and raise.
    """
    try:
        if not output.is_quantized:  # it would crash, not raise; an earlier hook may quantize the output
            return lazy_clone(output.detach() if output.requires_grad else output)
    except RuntimeError:
        pass
    return output.detach().clone()


def own(result: Tensor) -> Tensor:
    """Makes a computed tensor safe to keep.

    A tensor that uses only a part of its storage is copied, so the rest can be freed.
    """
    dense = result.layout is torch.strided and not result.is_nested
    if dense and tensor_bytes(result) < sum(memory_of(result).values()):
        return result.clone(memory_format=torch.contiguous_format)
    return snapshot(result)
