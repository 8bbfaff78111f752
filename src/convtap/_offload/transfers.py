"""Tracks the copies in flight from one device, within a window of bytes."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import torch
from torch import Tensor

from convtap._offload.cuda_streams import Streams
from convtap._tensors.memory import storage_key, tensor_bytes
from convtap._torch.lock import Lock

# Note: [Copies in flight]
# Assumption: the host runs ahead of the device. When a hook returns, the layer's output may not be computed yet, and the
#   copy may not have begun.
# Failure: a side stream that does not wait reads values before they are written. If a source is freed during its copy, the
#   next layer may write to its memory. If a destination is freed, another copy may write to its memory.
# Choice: the side stream waits for an event of the compute stream, which is recorded before the copy is launched. References
#   hold source and destination until the copy's own event has passed on the host. convtap does not use ``record_stream``,
#   which may miss the memory under a copy-on-write tensor. In-place writes after the hook do no harm: the source is a
#   snapshot, and the writer gets new memory. See Note: [Copy-on-write snapshots].


class Copy:
    """One copy, with its source and destination until its event has passed.

    Attributes:
        event: passes when the copy is done. None after the host knows that.
        error: the error of the copy, or None.
    """

    __slots__ = ("destination", "error", "event", "size", "source")

    def __init__(self, source: Tensor, destination: Tensor, event: Any, size: int) -> None:
        self.source: Tensor | None = source
        self.destination: Tensor | None = destination
        self.event = event
        self.size = size
        self.error: Exception | None = None


class Transfers:
    """The copies from one device, in order, on a side stream.

    Attributes:
        failed: whether any copy has failed.
    """

    def __init__(self, streams: Streams, device: torch.device, window: int) -> None:
        self.failed = False
        self._streams = streams
        self._device = device
        self._window = window
        self._side = streams.side(device)
        self._copies: deque[Copy] = deque()
        self._bytes = 0
        self._events: list[Any] = []
        self._lock = Lock()

    def start(self, source: Tensor, destination: Tensor) -> Copy:
        """Starts a copy when the window has room for its source.

        A source that is larger than the window is copied alone.
        """
        key = storage_key(source)
        size = max(tensor_bytes(source), key[1] if key else 0)  # a source keeps its whole storage alive
        with self._lock:
            self._retire(size)
            copy = Copy(source, destination, self._events.pop() if self._events else self._streams.event(), size)
            self._bytes += size
            self._copies.append(copy)
            try:
                self._launch(copy)
            except Exception as error:  # reading the value raises it with the layer's name
                self._copies.pop()
                self._fail(copy, error)
                self._finish(copy)
        return copy

    def wait(self, copy: Copy) -> None:
        """Waits for a copy's own event."""
        event = copy.event
        if event is None:
            return
        # Wait without the lock, so the thread that runs the model can continue. The event may belong to a later copy by
        # now, which comes after this copy on the same stream. An error may come from an earlier copy, but then this copy's
        # values are not reliable either.
        error = None
        try:
            self._streams.synchronize(event)
        except Exception as caught:
            error = caught
        with self._lock:
            while copy.event is not None:
                self._finish_oldest()
            if error is not None and copy.error is None:
                self._fail(copy, error)

    def drain(self) -> None:
        """Waits for all copies."""
        with self._lock:
            while self._copies:
                self._finish_oldest()

    def __del__(self) -> None:
        # If a capture was entered and never left, the copies must not outlive the memory that they write to.
        with contextlib.suppress(Exception):
            self.drain()

    def _launch(self, copy: Copy) -> None:
        streams, event, side = self._streams, copy.event, self._side
        assert copy.source is not None
        assert copy.destination is not None
        streams.record(event, streams.current(self._device))
        streams.wait_for(side, event)
        streams.copy(copy.destination, copy.source, side)
        streams.record(event, side)  # the side stream waits for the earlier recording, so the event can be reused

    def _retire(self, size: int) -> None:
        """Releases finished copies, and waits until ``size`` bytes fit into the window."""
        while self._copies:
            if self._bytes + size <= self._window and not self._oldest_is_done():
                return
            self._finish_oldest()

    def _oldest_is_done(self) -> bool:
        try:
            return self._streams.has_passed(self._copies[0].event)
        except Exception:  # _finish_oldest meets the error again and records it
            return True

    def _finish_oldest(self) -> None:
        copy = self._copies[0]
        try:
            self._streams.synchronize(copy.event)
        except Exception as error:
            self._fail(copy, error)
        else:
            self._events.append(copy.event)
        self._copies.popleft()
        self._finish(copy)

    def _fail(self, copy: Copy, error: Exception) -> None:
        copy.error = error.with_traceback(None)  # the frames would keep the model's tensors alive
        self.failed = True

    def _finish(self, copy: Copy) -> None:
        self._bytes -= copy.size
        copy.source = copy.destination = copy.event = None
