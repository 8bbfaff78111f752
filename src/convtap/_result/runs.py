"""The calls of a log by layer, updated incrementally."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from convtap._result.call import Call, append_runs
from convtap._torch.lock import Lock

# Note: [Calls by layer]
# Assumption: while a capture is open, each layer that runs appends a call to its log, and a loop may read one after each.
# Failure: the key of a layer's only call changes when the layer runs again (``conv`` becomes ``conv#0``), so a mapping of all
#   keys would have to be rebuilt after each call. It would also keep outputs alive after ``clear`` has removed them.
# Choice: each layer has a list of calls, and the position of a call in it is the call's number. A read adds only the calls
#   that were appended since the last read. Every other change of the calls also discards the lists.


class Runs:
    """The calls of each layer in order. See Note: [Calls by layer].

    Attributes:
        added: the number of calls that were added to the lists since the start.
    """

    def __init__(self) -> None:
        self.added = 0
        self._lock = Lock()
        self.forget()

    def __reduce__(self) -> Any:
        return Runs, ()  # a copy builds its own lists

    def forget(self) -> None:
        """Discards the lists, since calls were removed or replaced."""
        with self._lock:
            self._lists: dict[str, list[Call]] = {}
            self._newest: Any = None

    def of(self, name: str, calls: dict[Any, Call]) -> list[Call]:
        """Updates the lists and returns the calls of a layer."""
        self.update(calls)
        return self._lists.get(name, [])

    def update(self, calls: dict[Any, Call]) -> None:
        """Adds and numbers the calls that were appended since the last update."""
        with self._lock:
            try:
                newest, found = self._appended(reversed(calls.items()))
            except RuntimeError:  # another thread has appended meanwhile
                newest, found = self._appended(reversed(list(calls.items())))
            append_runs(self._lists, reversed(found))
            self._newest = newest
            self.added += len(found)

    def _appended(self, newest_first: Iterable[tuple[Any, Call]]) -> tuple[Any, list[Call]]:
        """Returns the newest key and the calls since the last update, newest first."""
        known, newest = self._newest, self._newest
        found: list[Call] = []
        for key, call in newest_first:
            if key == known:
                break
            if not found:
                newest = key
            found.append(call)
        return newest, found
