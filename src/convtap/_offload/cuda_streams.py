"""The operations on CUDA streams and events that offloading needs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The operations that offloading needs from a device.

    Streams and events are opaque handles for these methods.
    """

    def device(self, tensor: Tensor) -> torch.device:
        """Returns where a tensor lives."""

    def is_asynchronous(self, tensor: Tensor) -> bool:
        """Returns whether the device copies to pinned memory while it computes."""

    def is_capturing(self) -> bool:
        """Returns whether launched work goes into a graph instead of running."""

    def current(self, device: torch.device) -> Any:
        """Returns the stream that the device computes on now."""

    def side(self, device: torch.device) -> Any:
        """Returns a new stream of the device."""

    def event(self) -> Any:
        """Returns a new event."""

    def record(self, event: Any, stream: Any) -> None:
        """Makes the event pass when the stream has finished its work so far."""

    def wait_for(self, stream: Any, event: Any) -> None:
        """Makes later work of the stream wait for the event, as recorded last."""

    def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
        """Launches a copy on the stream. Returns at once."""

    def has_passed(self, event: Any) -> bool:
        """Returns whether the event has passed. Raises earlier errors of the device."""

    def synchronize(self, event: Any) -> None:
        """Waits for the event. Raises earlier errors of the device."""

    def pinned(self, size: int) -> Tensor:
        """Allocates ``size`` bytes of page-locked host memory.

        Raises:
            RuntimeError: if the system refuses the memory.
        """


class CudaStreams:
    """CUDA's streams and events, and ROCm's, which have the same names in torch."""

    def device(self, tensor: Tensor) -> torch.device:
        """Returns where a tensor lives."""
        return tensor.device

    def is_asynchronous(self, tensor: Tensor) -> bool:
        """Returns whether the tensor is on CUDA."""
        return tensor.is_cuda

    def is_capturing(self) -> bool:
        """Returns whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def current(self, device: torch.device) -> Any:
        """Returns the stream that the device computes on now."""
        return torch.cuda.current_stream(device)

    def side(self, device: torch.device) -> Any:
        """Returns a stream from torch's pool."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        """Returns an event without timing, which is cheaper than one with timing."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, event: Any, stream: Any) -> None:
        """Records the event on the stream."""
        event.record(stream)

    def wait_for(self, stream: Any, event: Any) -> None:
        """Makes the stream wait; the host does not."""
        stream.wait_event(event)

    def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
        """Launches the copy on the stream. The host does not wait for pinned memory."""
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def has_passed(self, event: Any) -> bool:
        """Returns whether the event has passed."""
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        """Waits for the event on the host."""
        event.synchronize()

    def pinned(self, size: int) -> Tensor:
        """Allocates from torch's caching host allocator.

        The allocator keeps freed memory for the next capture.
        """
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
