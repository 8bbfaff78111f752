"""Keeps a capture within ``max_bytes``. Shared memory counts once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from convtap._errors import MemoryLimitExceeded
from convtap._result.call import Call, held_bytes
from convtap._result.log import Log
from convtap._table import human_bytes

# Note: [Counting kept memory]
# Assumption: the memory of a call is identified by its address, and counted when the call is stored.
# Failure: the address can change later. If the user writes into an output, copy-on-write moves it to new memory, and an
#   offloaded result may move to pageable memory. Subtracting the call's current memory would leave its old memory counted
#   forever. The next output at the old address would then look like shared memory, and would not count at all.
# Choice: each call is subtracted as it was added. If a new call has an address that others were counted for, the others
#   that have moved are counted again. Before the limit stops a forward pass, all calls are counted again.


class Budget:
    """A limit on the memory that the calls of a log keep alive."""

    def __init__(self, limit: int, log: Log) -> None:
        self._limit = limit
        self._log = log
        self._forget()

    def reserve(self, call: Call, replaced: Call | None) -> None:
        """Counts a call before it is stored, in place of ``replaced`` if it is given.

        Raises:
            MemoryLimitExceeded: if the call exceeds the limit. The counts then stay as they were.
        """
        if self._cleared != self._log.cleared:
            self._forget()
        if replaced is not None:
            self._remove(replaced)
        self._add(call)
        if self._total <= self._limit:
            return
        self._forget()
        for kept in self._log.calls.values():
            if kept is not replaced:
                self._add(kept)
        others = self._total
        self._add(call)
        if self._total <= self._limit:
            return
        needed = self._total - others
        self._remove(call)
        if replaced is not None:
            self._add(replaced)
        raise MemoryLimitExceeded(self._message(call, replaced, needed, self._limit - others))

    def withdraw(self, call: Call) -> None:
        """Stops counting a call."""
        if call in self._counted:
            self._remove(call)

    def _forget(self) -> None:
        self._cleared = self._log.cleared
        self._counted: dict[Call, dict[Any, int]] = {}
        self._users: dict[Any, dict[Call, None]] = {}
        self._total = 0

    def _add(self, call: Call) -> None:
        counted = self._counted[call] = held_bytes([call])
        moved: dict[Call, None] = {}
        for key, size in counted.items():
            users = self._users.setdefault(key, {})
            moved.update((user, None) for user in users if key not in held_bytes([user]))
            if not users:
                self._total += size
            users[call] = None
        for user in moved:
            self._remove(user)
            self._add(user)

    def _remove(self, call: Call) -> None:
        for key, size in self._counted.pop(call, {}).items():
            users = self._users[key]
            del users[call]
            if not users:
                del self._users[key]
                self._total -= size

    def _message(self, call: Call, replaced: Call | None, needed: int, free: int) -> str:
        who = _holders(self._log.calls.values())
        limit = f"max_bytes={self._limit} ({human_bytes(self._limit)})"
        less = "Keep less of each output with reduce=lambda t: t.mean(-1) or dtype=torch.float16, "
        if not who:
            return (
                f"the output of {call.name!r} needs {human_bytes(needed)}, which is more than {limit}. {less}"
                "or pass a larger max_bytes."
            )
        instead = "more" if replaced is None else "in place of its last output"
        return (
            f"the output of {call.name!r} needs {human_bytes(needed)} {instead}, but only {human_bytes(max(0, free))} of "
            f"{limit} is left. The capture holds: {who}. {less}select fewer layers, keep only the last call of each with "
            "keep='last', call acts.clear() between passes, or pass a larger max_bytes."
        )


def _holders(calls: Iterable[Call]) -> str:
    """Names the five layers that hold most bytes.

    Shared memory counts for the first layer that holds it.
    """
    known: set[Any] = set()
    holders: dict[str, int] = {}
    for call in calls:
        memory = held_bytes([call])
        new = sum(size for key, size in memory.items() if key not in known)
        known.update(memory)
        holders[call.name] = holders.get(call.name, 0) + new
    largest = sorted(holders.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {human_bytes(size)}" for name, size in largest if size)
