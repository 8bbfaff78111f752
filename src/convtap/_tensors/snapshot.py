"""Copies of tensors that keep their value: copy-on-write where torch can do that, and clones elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convtap._tensors.memory import memory_of, tensor_bytes

# Note: [Copy-on-write snapshots]
# Assumption: ``torch._lazy_clone`` returns a tensor that shares memory until either side is written, and the writer
#   then copies; views made before or after write through the same storage and so count as the writer.
# Failure: it is private and not for every tensor. A quantized tensor crashes the process later; nested, sparse and
#   mkldnn tensors raise, and so does memory that torch did not allocate (``torch.from_numpy``); Dynamo cannot
#   trace it, so what is traced (``tapped``) clones.
# Choice: an allow-list (exactly ``torch.Tensor``, strided, not quantized, not nested), and ``clone`` for all else.


def _copy_on_write() -> Callable[[Tensor], Tensor]:
    """Returns ``torch._lazy_clone`` if it does what the note assumes, probed once; else ``clone``."""
    lazy: Callable[[Tensor], Tensor] = getattr(torch, "_lazy_clone", torch.clone)
    original = torch.zeros(2)
    kept = lazy(original)
    original.view(-1).add_(1)
    return lazy if kept.tolist() == [0.0, 0.0] and original.tolist() == [1.0, 1.0] else torch.clone


_lazy_clone = _copy_on_write()
_strided = torch.strided


def snapshot(tensor: Tensor) -> Tensor:
    """Returns a tensor with the value of ``tensor`` now, whatever is written into ``tensor`` later."""
    if type(tensor) is Tensor and tensor.layout is _strided and not (tensor.is_quantized or tensor.is_nested):
        try:
            return _lazy_clone(tensor)
        except RuntimeError:  # memory that torch did not allocate itself
            pass
    return tensor.clone()


def snapshot_of_result(output: Tensor) -> Tensor:
    """``snapshot``, detached, of what a plain convolution gave: other layouts are rare there, and raise."""
    try:
        if not output.is_quantized:  # that does not raise but crash; a hook before ours may have made it so
            return _lazy_clone(output.detach() if output.requires_grad else output)
    except RuntimeError:
        pass
    return output.detach().clone()


def own(result: Tensor) -> Tensor:
    """Makes a computed tensor safe to keep: a part of a larger storage keeps its own bytes, and no more."""
    dense = result.layout is torch.strided and not result.is_nested
    if dense and tensor_bytes(result) < sum(memory_of(result).values()):
        return result.clone(memory_format=torch.contiguous_format)
    return snapshot(result)
