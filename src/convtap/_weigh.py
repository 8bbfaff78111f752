"""Weighs what a capture would keep, and keeps none of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convtap._call import Call
from convtap._memory import storage_key, tensor_bytes
from convtap._policy import Policy
from convtap._structure import Held, map_leaves

# Note: [Shared memory in a forecast]
# Assumption: outputs that would share memory count once (an nn.Identity, a Flatten, a Dropout in eval mode).
# Failure: nothing is kept here, so the model's memory is freed and given out again: the same address can be another
#   output. And without a snapshot in its way an in-place layer writes where its input was; a capture would have made it
#   write elsewhere.
# Choice: the same address is the same memory if the storage seen there still exists and its version is the same. A
#   tensor of inference mode has no version, so each of those counts in full.


class Weighed(Held):
    """What would be kept of one tensor: its shape and type, as a tensor without values, and its bytes."""

    __slots__ = ("nbytes", "tensor")

    def __init__(self, tensor: Tensor, nbytes: int) -> None:
        self.tensor = tensor
        self.nbytes = nbytes

    def read(self, key: str) -> Tensor:
        """Returns the tensor without values."""
        return self.tensor


@dataclass(frozen=True)
class Weigher(Policy):
    """A policy that applies ``reduce`` and ``dtype`` as a capture does, and keeps bytes instead of values."""

    seen: dict[Any, tuple[Any, int]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """No: each output is weighed."""
        return False

    def keep_output(self, tensor: Tensor, fresh: bool = True) -> Any:
        """Weighs what would be kept of an output."""
        kept = super().keep_output(tensor, fresh)
        meta = kept if kept.is_quantized else torch.empty_like(kept, device="meta")
        return Weighed(meta, self._bytes(tensor, kept))

    def _bytes(self, tensor: Tensor, kept: Tensor) -> int:
        key, original = storage_key(kept), storage_key(tensor)
        if key is None:
            return tensor_bytes(kept)
        if original is None or original[0] != key[0] or tensor.is_inference():
            return key[1]
        place = (str(kept.device), key[0])
        storage, version = self.seen.get(place, (None, -1))
        if storage is not None and version == tensor._version and not storage.expired():
            return 0
        self.seen[place] = (_weak(tensor), tensor._version)
        return key[1]


def _weak(tensor: Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def weight(call: Call) -> int:
    """Returns the bytes that a weighed call would add to what is kept."""
    found: list[Any] = []
    map_leaves(found.append, call._value, Weighed)
    return sum(weighed.nbytes for weighed in found)
