"""Moves kept tensors to another device, from CUDA to the CPU asynchronously."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported, plural
from convtap._offload.cuda_streams import CudaStreams, Streams
from convtap._offload.pinned_pool import Pool, Slab, pinned_limit
from convtap._offload.transfers import Copy, Transfers
from convtap._result.call import Call, given_of, held_value
from convtap._table import human_bytes
from convtap._tensors.memory import tensor_bytes
from convtap._tensors.nested import Held, map_leaves
from convtap._torch.lock import Lock
from convtap._torch.modes import outside_function_modes

#: The most bytes of sources that wait for their copies, per device. Offloading uses this much extra device memory.
WINDOW = 256 * 2**20

_REMEDY = "Write offload='cpu', or another device that this machine has."

# Note: [Where results live]
# Assumption: a copy is asynchronous and fast only into pinned memory. Other programs cannot use pinned memory.
# Failure: if all results stay pinned, they fill the machine's memory. If all results move to pageable memory, each is
#   written twice, at the speed of the host, which is slower than the bus.
# Choice: a result stays where the copy put it, until ``pinned_limit()`` bytes are pinned. After that, the results in the
#   slab that was filled first move to pageable memory, which frees the slab. A result that the user has read stays.
#   If no result can move, or the system refuses memory, the copy goes to pageable memory and the capture warns.
#   This choice is reasoned, not measured. benchmarks/offload.py measures both costs on a CUDA device.
#
# Small tensors have no separate path. Gathering several into one costs a launch, as does the copy of each, and a blocking
# copy would stop the device. This is also reasoned, not measured.


class Offloaded(Held):
    """A tensor whose copy may still be running.

    Attributes:
        tensor: the destination. Its shape and type are right from the start, its values after ``read``.
    """

    __slots__ = ("__weakref__", "_copy", "_lock", "_transfers", "_was_read", "tensor")

    def __init__(self, tensor: Tensor, copy: Copy, transfers: Transfers, lock: Lock) -> None:
        self.tensor = tensor
        self._copy: Copy | None = copy
        self._transfers: Transfers | None = transfers
        self._lock = lock
        self._was_read = False

    def read(self, key: str) -> Tensor:
        """Waits for its own copy and returns the tensor.

        Raises:
            ConvtapError: if the copy failed.
        """
        self._wait()
        error = self.failure(key)
        if error is not None:
            raise error
        with self._lock:
            self._was_read = True
            return self.tensor

    def failure(self, key: str) -> ConvtapError | None:
        """Returns the error to raise if the copy has failed, or None."""
        copy = self._copy
        if copy is None or copy.error is None:
            return None
        error = copy.error
        failure = ConvtapError(
            f"the output of {key!r} was lost: its copy to the CPU failed with {type(error).__name__}: {error}. "
            "A device reports errors late, so an earlier operation of the model may be the cause. Run the model alone with "
            "CUDA_LAUNCH_BLOCKING=1, or capture without offload."
        )
        failure.__cause__ = error
        return failure

    def can_leave(self) -> bool:
        """Returns whether the tensor may move to pageable memory.

        It may not if the user has read it, or if an autograd graph ends in it.
        """
        self._wait()
        return not self._was_read and not self.tensor.requires_grad and self._copy is None

    def leave(self) -> None:
        """Moves the tensor to pageable memory, unless it was read meanwhile."""
        with self._lock:
            if not self._was_read:
                self.tensor = self.tensor.clone()

    def _wait(self) -> None:
        copy, transfers = self._copy, self._transfers
        if copy is not None and transfers is not None:
            transfers.wait(copy)
            if copy.error is None:
                self._copy = self._transfers = None

    def __reduce__(self) -> Any:  # copies and pickles of the capture hold plain tensors
        return torch.clone, (self.read("a layer").detach(),)


class _Moved(torch.autograd.Function):
    """The copy as an autograd operation, so gradients flow back through it."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, start: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.device = source.device
        return start(source)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to(ctx.device), None


class Offloader:
    """Moves tensors to one device, for one capture at a time.

    Args:
        device: the destination.
        streams: the streams of the device that tensors come from.
        window: the most bytes of sources in flight, per device.
        pinned: the most bytes of pinned memory. The default is ``pinned_limit()``.
        slab: the number of bytes that are pinned at once.

    Raises:
        InvalidType: if ``device`` is not a device.
        InvalidValue: if the device cannot hold values, or if this machine does not have it.
    """

    def __init__(
        self,
        device: Any,
        *,
        streams: Streams | None = None,
        window: int = WINDOW,
        pinned: int | None = None,
        **sizes: int,
    ) -> None:
        self.device = _checked(device)
        self._streams: Streams = CudaStreams() if streams is None else streams
        self._window = window
        self._pool = Pool(self._streams.pinned, pinned_limit() if pinned is None else pinned, **sizes)
        self._transfers: dict[torch.device, Transfers] = {}
        self._lock = Lock()
        self._read_lock = Lock()
        self._missed: list[int] = []

    def is_home(self, tensor: Tensor) -> bool:
        """Returns whether the tensor is already on the device."""
        return self._streams.device(tensor) == self.device

    def move(self, tensor: Tensor) -> Any:
        """Returns the tensor on the device, or an ``Offloaded`` while its copy runs.

        The caller must not write to the tensor's memory after this call.
        """
        if self.is_home(tensor):
            return tensor
        streams = self._streams
        if self.device.type != "cpu" or not streams.is_asynchronous(tensor) or not _is_plain(tensor):
            return tensor.to(self.device)
        if streams.is_capturing():
            raise Unsupported(
                "offload does not work while a CUDA graph is captured, because every replay would write to the same memory. "
                "Capture without offload, or run the model eagerly inside the capture."
            )
        with self._lock, outside_function_modes():
            return self._start(_dense(tensor))

    def drain(self) -> bool:
        """Waits for every copy. Returns whether all of them succeeded."""
        for transfers in self._transfers.values():
            transfers.drain()
        return not any(transfers.failed for transfers in self._transfers.values())

    def warning(self) -> str | None:
        """Returns one warning about the outputs that bypassed pinned memory, or None."""
        missed, self._missed = self._missed, []
        if not missed:
            return None
        refusal = self._pool.refusal
        why = (
            f"the system refused to pin more memory ({type(refusal).__name__}: {_first(refusal)})"
            if refusal is not None
            else f"all {human_bytes(self._pool.limit)} that a capture may pin were in use"
        )
        return (
            f"{plural(len(missed), 'output')} ({human_bytes(sum(missed))}) went through pageable memory, and the device "
            f"waited for the copies: {why}. No output is lost. To keep less, use reduce=lambda t: t.mean(-1), "
            "dtype=torch.float16, fewer layers, keep='last', or acts.clear() between passes."
        )

    def _start(self, source: Tensor) -> Any:
        size = tensor_bytes(source)
        slab = self._pool.acquire(size) or self._make_room(size)
        if slab is None:
            self._missed.append(size)
            return source.to(self.device)
        destination = slab.like(source)
        device = self._streams.device(source)
        transfers = self._transfers.get(device)
        if transfers is None:
            transfers = self._transfers[device] = Transfers(self._streams, device, self._window)
        copies: list[Copy] = []

        def start(source: Tensor) -> Tensor:
            copies.append(transfers.start(source.detach(), destination))
            return destination

        tensor = _Moved.apply(source, start) if source.requires_grad else start(source)  # type: ignore[no-untyped-call]
        held = Offloaded(tensor, copies[0], transfers, self._read_lock)
        slab.tenants.append(weakref.ref(held))
        return held

    def _make_room(self, size: int) -> Slab | None:
        """Moves results out of the oldest slabs until ``size`` bytes fit.

        See Note: [Where results live].
        """
        for slab in self._pool.by_age():
            if _evict(slab):
                found = self._pool.acquire(size)
                if found is not None:
                    return found
        return None


def _evict(slab: Slab) -> bool:
    """Moves all results of a slab to pageable memory, or none if one must stay."""
    for i, tenant in enumerate(slab.tenants):
        held = tenant()
        if held is not None and not held.can_leave():
            slab.tenants.insert(0, slab.tenants.pop(i))  # so the next call checks it first
            return False
    for tenant in slab.tenants:
        held = tenant()
        if held is not None:
            held.leave()
    slab.tenants.clear()
    return True


def first_failure(calls: Iterable[Call]) -> ConvtapError | None:
    """Returns the error of the first call whose copy failed, or None."""
    found: list[ConvtapError] = []
    for call in calls:
        helds: list[Any] = []
        map_leaves(helds.append, [held_value(call), given_of(call)], Offloaded)
        found += [error for error in (held.failure(call.key) for held in helds) if error is not None]
        if found:
            return found[0]
    return None


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether the bytes of a tensor hold all of its information."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and tensor.numel() > 0
    )


def _dense(tensor: Tensor) -> Tensor:
    """Returns the tensor if it is dense, or else a contiguous copy on its device."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _checked(device: Any) -> torch.device:
    if not isinstance(device, (str, torch.device, int)) or isinstance(device, bool):
        raise InvalidType(f"offload is a {type(device).__name__}, which is not a device. {_REMEDY}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InvalidValue(f"offload={device!r} is not a device. {_REMEDY}") from None
    if found.type == "meta":
        raise InvalidValue(f"offload='meta' would discard all values, since meta tensors have none. {_REMEDY}")
    if found.type == "cpu":
        return torch.device("cpu")
    try:
        return torch.empty(0, device=found).device
    except Exception as error:
        message = f"{type(error).__name__}: {_first(error)}"
        raise InvalidValue(f"offload={str(found)!r} does not work on this machine: {message}. {_REMEDY}") from error


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else ""
