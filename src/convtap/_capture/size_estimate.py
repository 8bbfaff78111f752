"""Estimates the bytes that a capture would keep, without keeping outputs."""

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
# Failure: an estimate keeps nothing, so the model's memory is freed and reused, and one address can belong to several
#   outputs. Also, an in-place layer writes into its input here, while the snapshot of a capture would make it write
#   elsewhere.
# Choice: one address is one memory if the storage seen there still exists and has the same version. A tensor of
#   inference mode has no version, so each such tensor counts in full.


class EstimatedSize(Held):
    """The shape, type and bytes of a tensor that a capture would keep.

    Attributes:
        nbytes: the bytes.
        tensor: a tensor without values that has the shape and the type.
    """

    __slots__ = ("nbytes", "tensor")

    def __init__(self, tensor: Tensor, nbytes: int) -> None:
        self.tensor = tensor
        self.nbytes = nbytes

    def read(self, key: str) -> Tensor:
        """Returns the tensor without values."""
        return self.tensor


@dataclass(frozen=True)
class SizeEstimator(Policy):
    """A policy that keeps sizes instead of values.

    It applies ``reduce`` and ``dtype`` as a capture does.
    """

    keeps_fakes = True  # with the size that the real tensors would have
    seen: dict[Any, tuple[Any, int]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Always False, since the size of each output is estimated."""
        return False

    def keep_output(self, tensor: Tensor, fresh: bool = True) -> Any:
        """Estimates the size of the value that a capture would keep."""
        kept = super().keep_output(tensor, fresh)
        return EstimatedSize(_without_values(kept), self._bytes(tensor, kept))

    def _bytes(self, tensor: Tensor, kept: Tensor) -> int:
        originals, copies = parts(tensor), parts(kept)
        if self.transforms or len(originals) != len(copies):
            return sum(sum(_memory(part).values()) for part in copies)
        return sum(self._new(one, other) for one, other in zip(originals, copies, strict=True))

    def _new(self, part: Tensor, kept: Tensor) -> int:
        """Returns the bytes of a kept part, or 0 if its memory was counted before."""
        memory = _memory(kept)
        if part.is_inference() or not memory:
            return sum(memory.values())
        ((place, size),) = memory.items()
        if has_no_values(part):
            ((place, size),) = _memory(part).items()  # a snapshot would share the original's memory, if it had any
        elif place not in memory_of(part):
            return size
        storage, version = self.seen.get(place, (None, -1))
        if storage is not None and version == part._version and not storage.expired():
            return 0
        self.seen[place] = (_weak(part), part._version)
        return size


def _memory(part: Tensor) -> dict[tuple[str, int], int]:
    """Returns ``memory_of`` a tensor, or of the real tensor that a fake represents."""
    if not has_no_values(part):
        return memory_of(part)
    return {("meta", storage_number(part)): part.untyped_storage().nbytes()}


def _without_values(tensor: Tensor) -> Any:
    """Returns a tensor of the same shape and type on the meta device.

    A nested tensor becomes a tuple of such tensors.
    """
    if tensor.is_quantized:
        return tensor
    if tensor.is_nested and tensor.layout is torch.strided:
        return tuple(_without_values(row) for row in tensor.unbind())
    if tensor.is_nested:  # jagged, a shape that other tensors cannot have
        try:
            return torch.empty_like(tensor, device="meta")
        except AssertionError:  # torch 2.6 has no jagged tensors on meta
            return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _weak(tensor: Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def estimated_bytes(call: Call) -> int:
    """Returns the estimated bytes that a call would add."""
    found: list[Any] = []
    map_leaves(found.append, held_value(call), EstimatedSize)
    return sum(size.nbytes for size in found)
