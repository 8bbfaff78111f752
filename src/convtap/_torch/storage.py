"""Reads the memory under tensors without ending copy-on-write, and makes copy-on-write clones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Note: [Copy-on-write clones]
# Assumption: ``torch._lazy_clone`` returns a tensor that shares memory until either side is written, and the writer
#   then copies; views made before or after write through the same storage and so count as the writer.
# Failure: it is private, and a torch that changes it would make snapshots follow later writes.
# Choice: it is tried once, at import; a torch without it, or with another meaning, gets ``clone``.


def _probed_clone() -> Callable[[Tensor], Tensor]:
    lazy: Callable[[Tensor], Tensor] = getattr(torch, "_lazy_clone", torch.clone)
    original = torch.zeros(2)
    kept = lazy(original)
    original.view(-1).add_(1)
    return lazy if kept.tolist() == [0.0, 0.0] and original.tolist() == [1.0, 1.0] else torch.clone


#: Clones a tensor: copy-on-write if torch can do that, else at once.
lazy_clone = _probed_clone()


def start_address(tensor: Tensor) -> int:
    """Returns where the storage under a tensor begins (``data_ptr`` would end copy-on-write); 0 if it is nowhere."""
    try:
        return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return 0


def storage_number(tensor: Tensor) -> int:
    """Returns what identifies the storage under a tensor for as long as it exists.

    Raises:
        RuntimeError, NotImplementedError: it has none.
    """
    return int(tensor.untyped_storage()._cdata)


def is_copy_on_write(value: object) -> bool:
    """Whether a value is a tensor whose memory is copied when it is next written."""
    try:
        return isinstance(value, Tensor) and bool(torch._C._is_cow_tensor(value))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return False
