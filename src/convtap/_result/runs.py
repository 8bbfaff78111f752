"""The calls of a log by layer, so that one is found without a look at the others."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from convtap._result.call import Call, append_runs

# Note: [Calls by layer]
# Assumption: while a capture is open, each layer that runs appends a call to its log, and a loop may read one after each.
# Failure: the key of a layer's only call changes when the layer runs again (``conv`` becomes ``conv#0``), so a mapping of all
#   keys would have to be built anew after each call; and it would keep outputs alive that ``clear`` has forgotten.
# Choice: the calls of each layer are a list, in which the place of a call is its number. A read adds only the calls that
#   were appended since the one before. Whatever else changes the calls also forgets the lists.


class Runs:
    """The calls of each layer in order, brought up to date when they are read. See Note: [Calls by layer].

    Attributes:
        added: how many calls were added to the lists since the start.
    """

    def __init__(self) -> None:
        self.added = 0
        self._lock = threading.RLock()
        self.forget()

    def __reduce__(self) -> Any:
        return Runs, ()  # a copy makes its own

    def forget(self) -> None:
        """Lets go of the calls: some were removed or replaced."""
        with self._lock:
            self._lists: dict[str, list[Call]] = {}
            self._newest: Any = None

    def of(self, name: str, calls: dict[Any, Call]) -> list[Call]:
        """Returns the calls of a layer; those that were appended since the last read are numbered first."""
        self.update(calls)
        return self._lists.get(name, [])

    def update(self, calls: dict[Any, Call]) -> None:
        """Adds the calls that were appended since the last update, and numbers them."""
        with self._lock:
            try:
                newest, found = self._appended(reversed(calls.items()))
            except RuntimeError:  # another thread has appended meanwhile
                newest, found = self._appended(reversed(list(calls.items())))
            append_runs(self._lists, reversed(found))
            self._newest = newest
            self.added += len(found)

    def _appended(self, newest_first: Iterable[tuple[Any, Call]]) -> tuple[Any, list[Call]]:
        """Returns the newest key, and the calls after the newest one that is known, newest first."""
        known, newest = self._newest, self._newest
        found: list[Call] = []
        for key, call in newest_first:
            if key == known:
                break
            if not found:
                newest = key
            found.append(call)
        return newest, found
