"""Pools pinned host memory in slabs, and reuses a slab when no tensor is in it."""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The size of a slab in bytes. A power of two, because torch's host allocator rounds up to one.
SLAB = 64 * 2**20

#: The most bytes that one capture pins, on a machine with at least four times as much memory.
PINNED = 4 * 2**30

_ALIGNMENT = 512

# Note: [Tensors in slabs]
# Assumption: pinning memory takes milliseconds per call, so tensors share slabs.
# Failure: if a tensor is a view of its slab, torch.save writes the whole slab, and the whole slab counts as held. All
#   results would also share one version counter, so a write to one would break the backward pass of another.
# Choice: ``torch.frombuffer`` over a ctypes object at the slab's address. The tensor's storage has exactly its own bytes.
#   When the last tensor or view is freed, so are the storage and the ctypes object.


class Slab:
    """One piece of pinned memory, filled from its start to its end.

    Attributes:
        size: the size in bytes.
        tenants: weak references to the owner's tensors in the slab since it was last empty.
        number: the order in which slabs were last empty; a later slab has a larger number.
    """

    def __init__(self, memory: Tensor) -> None:
        self.size = memory.numel()
        self.tenants: list[weakref.ref[Any]] = []
        self.number = 0
        self._memory = memory
        self._address = memory.data_ptr()
        self._layout = ctypes.c_char * self.size
        self._used = 0
        self._live = 0
        self._released: deque[None] = deque()

    def has_room(self, size: int) -> bool:
        """Returns whether ``size`` bytes are left at the end."""
        return self._used + size <= self.size

    def is_empty(self) -> bool:
        """Returns whether no tensor uses the slab. An empty slab is free again."""
        while self._released:
            self._released.pop()
            self._live -= 1
        if not self._live:
            self._used = 0
            self.tenants.clear()
        return not self._live

    def like(self, source: Tensor) -> Tensor:
        """Returns a new tensor in the slab that is laid out like a dense ``source``."""
        buffer = self._layout.from_address(self._address)
        # The bound method keeps the slab alive as long as the buffer. Any thread may free the last tensor, so the
        # finalizer does not change counts.
        weakref.finalize(buffer, self._release).atexit = False
        flat = torch.frombuffer(buffer, dtype=source.dtype, count=source.numel(), offset=self._used)
        self._used += aligned(source.numel() * source.element_size())
        self._live += 1
        empty = torch.empty(0, dtype=source.dtype, device="cpu")
        return empty.set_(flat.untyped_storage(), 0, source.shape, source.stride())

    def _release(self) -> None:
        self._released.append(None)


class Pool:
    """Slabs up to a limit of bytes. The pool is not thread-safe.

    Attributes:
        limit: the most bytes that the pool pins. It shrinks when the system refuses more memory.
        refusal: the system's error for a refused slab, or None.
    """

    def __init__(self, allocate: Callable[[int], Tensor], limit: int, slab: int = SLAB) -> None:
        self.limit = limit
        self.refusal: RuntimeError | None = None
        self._allocate = allocate
        self._slab = slab
        self._slabs: list[Slab] = []
        self._numbers = itertools.count(1)

    @property
    def total(self) -> int:
        """The number of pinned bytes."""
        return sum(slab.size for slab in self._slabs)

    def acquire(self, size: int) -> Slab | None:
        """Returns a slab with room for ``size`` bytes, or None if the limit is reached."""
        size = aligned(size)
        for slab in self._slabs:
            if slab.is_empty():
                slab.number = next(self._numbers)
            if slab.has_room(size):
                return slab
        new = max(self._slab, 1 << (size - 1).bit_length())
        if new > self.limit:
            return None
        for slab in [slab for slab in self._slabs if slab.is_empty()]:
            if self.total + new > self.limit:
                self._slabs.remove(slab)
        return self._grow(new) if self.total + new <= self.limit else None

    def by_age(self) -> list[Slab]:
        """Returns the slabs. The slab that was empty longest ago comes first."""
        return sorted(self._slabs, key=lambda slab: slab.number)

    def _grow(self, size: int) -> Slab | None:
        try:
            slab = Slab(self._allocate(size))
        except RuntimeError as error:
            # The frames of a traceback would keep their variables alive.
            self.refusal, self.limit = error.with_traceback(None), self.total
            return None
        slab.number = next(self._numbers)
        self._slabs.append(slab)
        return slab


def aligned(size: int) -> int:
    """Rounds a size up, so each tensor begins at an address that is fast to copy."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pinned_limit() -> int:
    """Returns ``PINNED``, or a quarter of the machine's memory if that is less."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return PINNED
    return min(PINNED, memory // 4)
