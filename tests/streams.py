"""Streams, events and pinned memory as CUDA has them, played on the CPU in the worst order that they allow.

A copy is not done when it is asked for. It is done when somebody waits for it or, now and then, when somebody looks;
until then its destination holds garbage. What was freed meanwhile is garbage too. All CPU tensors count as tensors of a
device, except those that a test places elsewhere.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GARBAGE = 0xAB


class Broken(BaseException):
    """What no device may be asked for. No Exception, so that nothing takes it for an error of a copy."""


class FakeEvent:
    """Passes when every recording of it was reached by its stream."""

    def __init__(self) -> None:
        self.recorded = 0
        self.reached = 0
        self.error: Exception | None = None


class FakeStream:
    """A queue of what is still to be done: (may it run now?, run it)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self.error: Exception | None = None

    def step(self) -> bool:
        if not self.queue or not self.queue[0][0]():
            return False
        self.queue.pop(0)[1]()
        return True


def garble(tensor: Tensor) -> None:
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(GARBAGE)


class FakeStreams:
    """The layer of ``convtap._offload.cuda_streams``, and its accounts.

    Attributes:
        log: what was asked for, in order.
        flying: the copies that are not done: their sources' bytes.
        most: the most of them at a time.
        fail_at: the copies, counted from 0, that go wrong on the device.
        pinned_sizes: the sizes of what was pinned; ``refuse_after`` of them, there is no more.
    """

    def __init__(self, seed: int = 0, place: Callable[[Tensor], int] = lambda tensor: 0) -> None:
        self.random = random.Random(seed)
        self.place = place
        self.log: list[str] = []
        self.flying: dict[int, int] = {}
        self.most = 0
        self.most_copies = 0
        self.copies = 0
        self.fail_at: set[int] = set()
        self.fail_launch_at: set[int] = set()
        self.pinned_sizes: list[int] = []
        self.refuse_after = 10**9
        self.attempts = 0
        self.capturing = False
        self.eager = 0.3
        self.streams: list[FakeStream] = []
        self.sides: dict[torch.device, FakeStream] = {}
        self.computing: dict[torch.device, FakeStream] = {}

    # -- the layer

    def device(self, tensor: Tensor) -> torch.device:
        return torch.device("cuda", self.place(tensor))

    def is_asynchronous(self, tensor: Tensor) -> bool:
        return True

    def is_capturing(self) -> bool:
        return self.capturing

    def current(self, device: torch.device) -> FakeStream:
        self.log.append("current")
        if device not in self.computing:
            self.computing[device] = self.stream(f"compute {device}")
        return self.computing[device]

    def side(self, device: torch.device) -> FakeStream:
        if device not in self.sides:
            self.sides[device] = self.stream(f"side {device}")
        return self.sides[device]

    def event(self) -> FakeEvent:
        self.log.append("event")
        return FakeEvent()

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        self.log.append(f"record on {stream.name}")
        event.recorded += 1
        number = event.recorded

        def reach() -> None:
            event.reached = max(event.reached, number)
            event.error, stream.error = stream.error, None

        stream.queue.append((lambda: True, reach))

    def wait_for(self, stream: FakeStream, event: FakeEvent) -> None:
        self.log.append(f"{stream.name} waits")
        number = event.recorded
        stream.queue.append((lambda: event.reached >= number, lambda: None))

    def copy(self, destination: Tensor, source: Tensor, stream: FakeStream) -> None:
        number, self.copies = self.copies, self.copies + 1
        if number in self.fail_launch_at:
            raise RuntimeError(f"copy {number} cannot be launched")
        self.log.append(f"copy on {stream.name}")
        garble(destination)
        # Weak: whoever frees these before the copy is done gets garbage.
        read, write = weakref.ref(source), weakref.ref(destination)
        self.flying[number] = source.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.flying.values()))
        self.most_copies = max(self.most_copies, len(self.flying))

        def run() -> None:
            del self.flying[number]
            source, destination = read(), write()
            if number in self.fail_at:
                stream.error = RuntimeError(f"copy {number} went wrong on the device")
            elif destination is None:
                raise Broken("a copy writes to memory that was freed")
            elif source is not None:
                with torch.no_grad():
                    destination.detach().copy_(source.detach())

        stream.queue.append((lambda: True, run))

    def has_passed(self, event: FakeEvent) -> bool:
        while self.random.random() < self.eager and self.advance():
            pass
        return event.reached == event.recorded

    def synchronize(self, event: FakeEvent) -> None:
        number = event.recorded
        while event.reached < number:
            if not self.advance():
                raise Broken("nothing can go on: a deadlock")
        if event.error is not None:
            error, event.error = event.error, None
            raise error

    def pinned(self, size: int) -> Tensor:
        self.attempts += 1
        if len(self.pinned_sizes) >= self.refuse_after:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        self.pinned_sizes.append(size)
        return torch.full((size,), GARBAGE, dtype=torch.uint8)

    # -- the time

    def advance(self) -> bool:
        """One step of a stream chosen at random among those that can go on."""
        order = self.random.sample(self.streams, len(self.streams))
        return any(stream.step() for stream in order)

    def compute(self, kernel: Callable[[], Any], device: int = 0) -> None:
        """Gives the compute stream something to do."""
        self.current(torch.device("cuda", device)).queue.append((lambda: True, kernel))

    def stream(self, name: str) -> FakeStream:
        """A new stream."""
        stream = FakeStream(name)
        self.streams.append(stream)
        return stream
