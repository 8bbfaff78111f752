"""Makes copy-on-write clones, and reads addresses without ending copy-on-write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Note: [Copy-on-write clones]
# Assumption: ``torch._lazy_clone`` returns a tensor that shares memory with the original until either is written. The
#   written tensor then copies the memory. A view, made before or after, shares the storage of its base, so a write to the
#   view counts as a write to the base.
# Failure: the function is private. If torch changes it, snapshots could follow later writes.
# Choice: convtap tries it once, at import. If torch lacks it, or if it behaves differently, convtap uses ``clone``.


def _probed_clone() -> Callable[[Tensor], Tensor]:
    lazy: Callable[[Tensor], Tensor] = getattr(torch, "_lazy_clone", torch.clone)
    original = torch.zeros(2)
    kept = lazy(original)
    original.view(-1).add_(1)
    return lazy if kept.tolist() == [0.0, 0.0] and original.tolist() == [1.0, 1.0] else torch.clone


#: Clones a tensor: copy-on-write if torch supports it, otherwise at once.
lazy_clone = _probed_clone()


def start_address(tensor: Tensor) -> int:
    """Returns the start address of a tensor's storage, or 0 if it has none.

    ``data_ptr`` would end copy-on-write.
    """
    try:
        return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return 0


def storage_number(tensor: Tensor) -> int:
    """Returns a number that identifies a tensor's storage while the storage exists.

    Raises:
        RuntimeError, NotImplementedError: if the tensor has no storage.
    """
    return int(tensor.untyped_storage()._cdata)


def is_copy_on_write(value: object) -> bool:
    """Returns whether a value is a tensor whose next write copies its memory."""
    try:
        return isinstance(value, Tensor) and bool(torch._C._is_cow_tensor(value))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return False
