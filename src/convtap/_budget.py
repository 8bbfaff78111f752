"""Keeps what a block holds within ``max_bytes``: memory counts once, however many outputs share it."""

from __future__ import annotations

from typing import Any

from convtap._call import Call, held_bytes
from convtap._errors import MemoryLimitExceeded
from convtap._log import Log
from convtap._table import human_bytes


class Budget:
    """A limit on the memory that the calls of a log keep alive."""

    def __init__(self, limit: int, log: Log) -> None:
        self._limit = limit
        self._log = log
        self._cleared = log.cleared
        self._users: dict[Any, int] = {}
        self._total = 0

    def admit(self, call: Call, replaced: Call | None) -> None:
        """Counts a call that is about to be stored, in place of another one or not.

        Raises:
            MemoryLimitExceeded: there is no room for it; nothing is counted then.
        """
        if self._cleared != self._log.cleared:
            self._cleared, self._users, self._total = self._log.cleared, {}, 0
        if replaced is not None:
            self._count(replaced, -1)
        before = self._total
        self._count(call, +1)
        if self._total > self._limit:
            needed = self._total - before
            self._count(call, -1)
            if replaced is not None:
                self._count(replaced, +1)
            raise MemoryLimitExceeded(self._message(call, needed))

    def _count(self, call: Call, change: int) -> None:
        for key, size in held_bytes([call]).items():
            users = self._users.get(key, 0) + change
            if users == (1 if change > 0 else 0):
                self._total += change * size
            self._users[key] = users
            if not users:
                del self._users[key]

    def _message(self, call: Call, needed: int) -> str:
        holders: dict[str, int] = {}
        for held in self._log.calls.values():
            holders[held.name] = holders.get(held.name, 0) + held.nbytes
        largest = sorted(holders.items(), key=lambda item: -item[1])[:5]
        who = ", ".join(f"{name} {human_bytes(size)}" for name, size in largest) or "nothing yet"
        return (
            f"the output of {call.name!r} needs {human_bytes(needed)} more, and max_bytes={self._limit} "
            f"({human_bytes(self._limit)}) is all but {human_bytes(max(0, self._limit - self._total))} used. "
            f"Held now: {who}. Keep less of each output with reduce=lambda t: t.mean(-1) or dtype=torch.float16, select "
            "fewer layers, keep only the last call of each with keep='last', call acts.clear() between passes, or give a "
            "larger max_bytes."
        )
