"""Pools pinned host memory in slabs, which are used again when no tensor uses them."""

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

#: The most bytes that one block pins, where the machine has four times as much memory.
PINNED = 4 * 2**30

_ALIGNMENT = 512

# Note: [Tensors in slabs]
# Assumption: pinning memory costs milliseconds a call, so tensors share slabs.
# Failure: a tensor that is a view of its slab drags the slab along: torch.save writes all of it, its bytes count as
#   held, and every result shares one version counter, so that writing one spoils the backward pass of another.
# Choice: ``torch.frombuffer`` over a ctypes object at the slab's address. The tensor's storage is exactly its own bytes,
#   and the storage's end, wherever and whenever the last tensor or view goes, is the end of the ctypes object.


class Slab:
    """One piece of pinned memory, handed out from its start to its end.

    Attributes:
        size: its bytes.
        tenants: weak references to what its owner put into it since it was last empty.
        number: grows with the time at which the slab was last empty.
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
        """Whether so many bytes are left at its end."""
        return self._used + size <= self.size

    def is_empty(self) -> bool:
        """Whether no tensor uses it; then all of it is free again."""
        while self._released:
            self._released.pop()
            self._live -= 1
        if not self._live:
            self._used = 0
            self.tenants.clear()
        return not self._live

    def like(self, source: Tensor) -> Tensor:
        """Returns a tensor in the slab with the type, shape and strides of ``source``, which is dense."""
        buffer = self._layout.from_address(self._address)
        # The bound method keeps the slab alive for as long as the buffer; and any thread may free the last tensor, so
        # nothing is counted there.
        weakref.finalize(buffer, self._release).atexit = False
        flat = torch.frombuffer(buffer, dtype=source.dtype, count=source.numel(), offset=self._used)
        self._used += aligned(source.numel() * source.element_size())
        self._live += 1
        empty = torch.empty(0, dtype=source.dtype, device="cpu")
        return empty.set_(flat.untyped_storage(), 0, source.shape, source.stride())

    def _release(self) -> None:
        self._released.append(None)


class Pool:
    """Slabs up to a limit of bytes. Not for several threads at once.

    Attributes:
        limit: the most bytes it pins; less than asked for once the system refused more.
        refusal: how the system refused more, or None.
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
        """The bytes that are pinned now."""
        return sum(slab.size for slab in self._slabs)

    def acquire(self, size: int) -> Slab | None:
        """Returns a slab with room for so many bytes, or None if the limit leaves none."""
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
        """Returns the slabs, the one that was empty longest ago first."""
        return sorted(self._slabs, key=lambda slab: slab.number)

    def _grow(self, size: int) -> Slab | None:
        try:
            slab = Slab(self._allocate(size))
        except RuntimeError as error:
            # Without its traceback, whose frames would keep alive what they hold.
            self.refusal, self.limit = error.with_traceback(None), self.total
            return None
        slab.number = next(self._numbers)
        self._slabs.append(slab)
        return slab


def aligned(size: int) -> int:
    """Rounds up, so that each tensor begins where a copy is fast."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pinned_limit() -> int:
    """Returns ``PINNED``, or a quarter of the machine's memory if that is less."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return PINNED
    return min(PINNED, memory // 4)
