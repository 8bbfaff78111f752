"""Copies of tensors that keep their value: copy-on-write where torch can do that, and clones elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from convtap._tensors.memory import memory_of, tensor_bytes
from convtap._torch.storage import lazy_clone

# Note: [Copy-on-write snapshots]
# Assumption: a copy-on-write clone (see Note: [Copy-on-write clones]) is right for an ordinary tensor.
# Failure: not for every one. A quantized tensor crashes the process later; nested, sparse and mkldnn tensors raise, and so
#   does memory that torch did not allocate (``torch.from_numpy``); Dynamo cannot trace it, so what is traced (``tapped``)
#   clones.
# Choice: an allow-list (exactly ``torch.Tensor``, strided, not quantized, not nested), and ``clone`` for all else.

_strided = torch.strided


def snapshot(tensor: Tensor) -> Tensor:
    """Returns a tensor with the value of ``tensor`` now, whatever is written into ``tensor`` later."""
    if type(tensor) is Tensor and tensor.layout is _strided and not (tensor.is_quantized or tensor.is_nested):
        try:
            return lazy_clone(tensor)
        except RuntimeError:  # memory that torch did not allocate itself
            pass
    return tensor.clone()


def snapshot_of_result(output: Tensor) -> Tensor:
    """``snapshot``, detached, of what a plain convolution gave: other layouts are rare there, and raise."""
    try:
        if not output.is_quantized:  # that does not raise but crash; a hook before ours may have made it so
            return lazy_clone(output.detach() if output.requires_grad else output)
    except RuntimeError:
        pass
    return output.detach().clone()


def own(result: Tensor) -> Tensor:
    """Makes a computed tensor safe to keep: a part of a larger storage keeps its own bytes, and no more."""
    dense = result.layout is torch.strided and not result.is_nested
    if dense and tensor_bytes(result) < sum(memory_of(result).values()):
        return result.clone(memory_format=torch.contiguous_format)
    return snapshot(result)
