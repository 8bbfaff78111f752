"""How the data begin: noted by the process that writes the first shard, and the same for every other one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from convtap._dataset.layout import write_first

_FILE = ".beginning.json"

# Note: [The whole iterable]
# Assumption: every process is given the same iterable, of which it takes its part of the batches.
# Failure: loaders that know the ranks themselves (a node splitter, split_dataset_by_node) give each process other samples, and
#   a part of a part is computed: the batches are all there, by their numbers, and half of the samples is not.
# Choice: who writes the first shard notes batch 0; who finds another one there stops before it writes any.


class Beginning:
    """The first batch, as the first process of the store saw it.

    Args:
        path: the store.
    """

    def __init__(self, path: Path) -> None:
        self._file = path / _FILE

    def read(self) -> dict[str, Any]:
        """Returns what was noted, or nothing: it guards against a mistake, and no row is read by it."""
        try:
            found = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, seen: dict[str, Any]) -> None:
        """Notes it, unless another process was first."""
        write_first(self._file, json.dumps(seen).encode())


def ids_seen(ids: Any) -> dict[str, Any]:
    """Writes the ids of a batch in short."""
    names = [repr(name) for name in ids] if hasattr(ids, "__iter__") else [repr(ids)]
    return {
        "ids": names[:3],
        "count": len(names),
        "digest": hashlib.sha256("\0".join(names).encode()).hexdigest()[:24],
    }


def other_ids(first: dict[str, Any], seen: dict[str, Any], rank: str) -> str | None:
    """Says that two processes saw other ids at the beginning of an iterable, or returns None if they did not."""
    if "digest" not in first or "digest" not in seen or first["digest"] == seen["digest"]:
        return None
    return (
        f"{rank}the data begins with the samples {_shown(seen)}, and for the process that began this store it "
        f"began with {_shown(first)}. Every process must be given the whole iterable, in the same order: extract deals its "
        "batches to the ranks itself. Leave out what splits or shuffles it (a node splitter, split_dataset_by_node)."
    )


def _shown(beginning: dict[str, Any]) -> str:
    more = f", … ({beginning['count']})" if beginning["count"] > len(beginning["ids"]) else ""
    return ", ".join(beginning["ids"]) + more
