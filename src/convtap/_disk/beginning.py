"""How an iterable begins: the same in every process and every run, or its batches would not be the ones that are missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convtap._disk.place import write_first
from convtap._errors import StoreError

_FILE = ".beginning.json"

# Note: [The whole iterable]
# Assumption: every process is given the same iterable, of which it takes its part of the batches.
# Failure: loaders that know the ranks themselves (a node splitter, split_dataset_by_node) give each process other samples, and
#   a part of a part is computed: the batches are all there, by their numbers, and half of the samples is not.
# Choice: who writes the first shard notes the ids of batch 0; who finds others there stops before it writes any.


class Beginning:
    """The ids of an iterable's first batch, compared with those that the first process of the store saw.

    Args:
        path: the store.
        where: what a message begins with: which rank this is.
        ids: the user's function of a batch.
    """

    def __init__(self, path: Path, where: str, ids: Callable[[Any], Any]) -> None:
        self._file = path / _FILE
        self._where = where
        self._ids = ids
        self._seen: dict[str, Any] | None = None

    def look(self, batch: Any) -> None:
        """Takes the first batch, and compares it if the store has a beginning.

        Raises:
            StoreError: they differ.
        """
        found = self._ids(batch)
        found = found.tolist() if hasattr(found, "tolist") else found
        names = [repr(name) for name in found] if hasattr(found, "__iter__") else [repr(found)]
        digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:24]
        self._seen = {"ids": names[:3], "count": len(names), "digest": digest}
        self._compare(self._seen)

    def settle(self) -> None:
        """Gives the store its beginning, unless it has one; to be called before a shard is written.

        Raises:
            StoreError: it has another one: another process was first.
        """
        if self._seen is not None:
            write_first(self._file, json.dumps(self._seen).encode())
            self._compare(self._seen)
            self._seen = None

    def _compare(self, seen: dict[str, Any]) -> None:
        try:
            first = json.loads(self._file.read_bytes())
            same, begun = first["digest"] == seen["digest"], _shown(first)
        except (OSError, ValueError, KeyError, TypeError):
            return  # not there yet, or damaged: it guards against a mistake, and nothing is read by it
        if not same:
            raise StoreError(
                f"{self._where}the data begins with the samples {_shown(seen)}, and for the process that began this store it "
                f"began with {begun}. Every process must be given the whole iterable, in the same order: extract deals its "
                "batches to the ranks itself. Leave out what splits or shuffles it (a node splitter, split_dataset_by_node)."
            )


def _shown(beginning: dict[str, Any]) -> str:
    more = f", … ({beginning['count']})" if beginning["count"] > len(beginning["ids"]) else ""
    return ", ".join(beginning["ids"]) + more
