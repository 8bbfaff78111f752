"""Estimates the bytes that a capture would keep, and keeps no output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convtap._record.policy import Policy
from convtap._result.call import Call, held_value
from convtap._tensors.memory import has_no_values, memory_of, parts
from convtap._tensors.nested import Held, map_leaves
from convtap._torch.storage import storage_number

# Note: [Shared memory in a forecast]
# Assumption: outputs that would share memory count once (an nn.Identity, a Flatten, a Dropout in eval mode).
# Failure: nothing is kept here, so the model's memory is freed and given out again: the same address can be another
#   output. And without a snapshot in its way an in-place layer writes where its input was; a capture would have made it
#   write elsewhere.
# Choice: the same address is the same memory if the storage seen there still exists and its version is the same. A
#   tensor of inference mode has no version, so each of those counts in full.


class EstimatedSize(Held):
    """What would be kept of one tensor: its shape and type, as a tensor without values, and its bytes."""

    __slots__ = ("nbytes", "tensor")

    def __init__(self, tensor: Tensor, nbytes: int) -> None:
        self.tensor = tensor
        self.nbytes = nbytes

    def read(self, key: str) -> Tensor:
        """Returns the tensor without values."""
        return self.tensor


@dataclass(frozen=True)
class SizeEstimator(Policy):
    """A policy that applies ``reduce`` and ``dtype`` as a capture does, and keeps bytes instead of values."""

    keeps_fakes = True  # what they would take
    seen: dict[Any, tuple[Any, int]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """No: the size of each output is estimated."""
        return False

    def keep_output(self, tensor: Tensor, fresh: bool = True) -> Any:
        """Estimates the size of what would be kept of an output."""
        kept = super().keep_output(tensor, fresh)
        return EstimatedSize(_without_values(kept), self._bytes(tensor, kept))

    def _bytes(self, tensor: Tensor, kept: Tensor) -> int:
        originals, copies = parts(tensor), parts(kept)
        if self.transforms or len(originals) != len(copies):
            return sum(sum(_memory(part).values()) for part in copies)
        return sum(self._new(one, other) for one, other in zip(originals, copies, strict=True))

    def _new(self, part: Tensor, kept: Tensor) -> int:
        """Returns the bytes of a kept part, unless its memory was counted before."""
        memory = _memory(kept)
        if part.is_inference() or not memory:
            return sum(memory.values())
        ((place, size),) = memory.items()
        if has_no_values(part):
            ((place, size),) = _memory(part).items()  # a snapshot would share the original's memory, were there any
        elif place not in memory_of(part):
            return size
        storage, version = self.seen.get(place, (None, -1))
        if storage is not None and version == part._version and not storage.expired():
            return 0
        self.seen[place] = (_weak(part), part._version)
        return size


def _memory(part: Tensor) -> dict[tuple[str, int], int]:
    """Returns what ``memory_of`` does; for a tensor without values, what the real one that it stands for would have."""
    if not has_no_values(part):
        return memory_of(part)
    return {("meta", storage_number(part)): part.untyped_storage().nbytes()}


def _without_values(tensor: Tensor) -> Any:
    """Returns a tensor of the same shape and type on meta, or (for a nested one) a tuple of them."""
    if tensor.is_quantized:
        return tensor
    if tensor.is_nested and tensor.layout is torch.strided:
        return tuple(_without_values(row) for row in tensor.unbind())
    if tensor.is_nested:  # jagged: no other tensor has such a shape
        try:
            return torch.empty_like(tensor, device="meta")
        except AssertionError:  # torch 2.6 has none on meta
            return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _weak(tensor: Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def estimated_bytes(call: Call) -> int:
    """Returns the estimated bytes that a call would add to what is kept."""
    found: list[Any] = []
    map_leaves(found.append, held_value(call), EstimatedSize)
    return sum(size.nbytes for size in found)
