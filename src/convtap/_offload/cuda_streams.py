"""The operations on CUDA streams and events that offloading needs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """What a device must offer. Streams and events are handles that only these methods look into."""

    def device(self, tensor: Tensor) -> torch.device:
        """Returns where a tensor lives."""

    def is_asynchronous(self, tensor: Tensor) -> bool:
        """Whether the tensor's device copies to pinned memory beside its computation."""

    def is_capturing(self) -> bool:
        """Whether what is launched now goes into a graph instead of running."""

    def current(self, device: torch.device) -> Any:
        """Returns the stream that the device computes on now."""

    def side(self, device: torch.device) -> Any:
        """Returns a new stream of the device."""

    def event(self) -> Any:
        """Returns a new event."""

    def record(self, event: Any, stream: Any) -> None:
        """Makes the event pass once all that the stream was given so far is done."""

    def wait_for(self, stream: Any, event: Any) -> None:
        """Makes the stream do what it is given from now on only after the event, as it was recorded last."""

    def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
        """Gives the stream a copy to do, and returns at once."""

    def has_passed(self, event: Any) -> bool:
        """Whether the event has passed. Raises what went wrong on the device before it."""

    def synchronize(self, event: Any) -> None:
        """Waits for the event. Raises what went wrong on the device before it."""

    def pinned(self, size: int) -> Tensor:
        """Returns that many bytes of page-locked host memory. RuntimeError if the system has no more."""


class CudaStreams:
    """CUDA's streams and events (and ROCm's, which torch gives the same names)."""

    def device(self, tensor: Tensor) -> torch.device:
        """Returns where a tensor lives."""
        return tensor.device

    def is_asynchronous(self, tensor: Tensor) -> bool:
        """Whether it is a CUDA tensor."""
        return tensor.is_cuda

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def current(self, device: torch.device) -> Any:
        """Returns the stream that the device computes on now."""
        return torch.cuda.current_stream(device)

    def side(self, device: torch.device) -> Any:
        """Returns a stream of torch's pool."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        """Returns an event without timing, which is the cheap kind."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, event: Any, stream: Any) -> None:
        """Records the event on the stream."""
        event.record(stream)

    def wait_for(self, stream: Any, event: Any) -> None:
        """Makes the stream wait; the host does not."""
        stream.wait_event(event)

    def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
        """Launches the copy on the stream; into pinned memory, it does not wait."""
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def has_passed(self, event: Any) -> bool:
        """Asks the event."""
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        """Waits for the event on the host."""
        event.synchronize()

    def pinned(self, size: int) -> Tensor:
        """Takes memory from torch's caching host allocator, which keeps for the next block what this one gives back."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
