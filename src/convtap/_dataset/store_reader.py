"""Finds the samples of a store by id and position, and keeps some of its shards open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convtap._dataset.column import Column, ColumnReader
from convtap._dataset.file_system import is_on_network
from convtap._dataset.index import read_index
from convtap._dataset.layout import read_description
from convtap._dataset.sample_positions import SamplePositions
from convtap._dataset.shard_file import CalledFile, MappedFile
from convtap._dataset.shard_reader import Shard
from convtap._dataset.summary import missing, unreadable
from convtap._errors import InvalidValue, OutOfRange, StoreError, listed

# Note: [Open shards]
# Assumption: a shard that is open takes a file descriptor, also if it is mapped.
# Failure: a store has more shards than a process may open files, which is 1,024 on many systems.
# Choice: a quarter of those, 4,096 at most. Where each layer's rows lie is in the index, so that opening a shard again reads
#   nothing of it.
_MOST_OPEN = 4096


class StoreReader:
    """What a store and its views read from.

    Args:
        path: the directory of the store.
        mapped: whether shards are mapped; None to decide by the file system.
        copies: whether rows are copied out of a map.

    Attributes:
        path, copies: as above.
        identity: what the store was made from.
        index: where every sample lies.
    """

    def __init__(self, path: Path, mapped: bool | None = None, copies: bool = True) -> None:
        if mapped is False and not copies:
            raise InvalidValue(
                "mmap=False reads rows into memory of their own, so copy=False has no effect. Leave one out."
            )
        self.path = path
        self.identity: dict[str, Any] = read_description(path)["identity"]
        self.index = read_index(path)
        self._positions = SamplePositions(self.index.ids)
        self._mapped = not is_on_network(path) if mapped is None else mapped
        self._must_map = mapped is True
        self.copies = copies or not self._mapped
        self._open: dict[int, _OpenShard] = {}

    def __len__(self) -> int:
        return len(self.index.ids)

    def position(self, id: Any) -> int:
        """Returns where in the order of samples an id is.

        Raises:
            OutOfRange: no sample has this id.
            StoreError: several have it.
        """
        position = self._positions.find(id)
        if position is None:
            raise OutOfRange(self._unknown(id))
        return position

    def positions(self, ids: Any) -> Any:
        """Returns an array of where in the order of samples an array of ids is; see ``position``."""
        found = self._positions.find_all(ids)
        if len(found) and found.min() < 0:
            raise OutOfRange(self._unknown(ids[found < 0].tolist()[0]))
        return found

    def column(self, number: int, key: str) -> ColumnReader:
        """Returns what reads a layer's rows in a shard, by the shard's number. See Note: [Open shards]."""
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._opened(number)
            while len(self._open) > most_open():
                self._open.pop(next(iter(self._open)), None)
        return shard.readers.get(key) or shard.reader(key)

    def shard(self, number: int) -> Shard:
        """Reads the header of a shard once more, by the shard's number.

        Raises:
            StoreError: the shard has changed since the store was opened, or cannot be read.
        """
        name = self.index.names[number]
        try:
            shard = Shard(f"{self.path}/{name}")
        except StoreError as error:
            raise StoreError(f"{name!r} {error}. It was whole when the store was opened.") from error
        if {key: shard.column(key) for key in shard.columns} != self.index.columns[number]:
            raise StoreError(f"{name!r} is another file than when the store was opened. Open the store again.")
        return shard

    def _opened(self, number: int) -> _OpenShard:
        name = self.index.names[number]
        path, known = self.path / name, self.index.files[name]
        try:
            state = path.stat()
        except OSError as error:
            raise StoreError(f"{name!r} cannot be read: {error}. It was whole when the store was opened.") from error
        if (state.st_size, state.st_mtime_ns) != known:
            self.shard(number)
        return _OpenShard(self._file(path, name, known[0]), self.index.columns[number])

    def _file(self, path: Path, name: str, size: int) -> MappedFile | CalledFile:
        if self._mapped:
            try:
                return MappedFile(path, name, size, self.copies)
            except (OSError, ValueError) as error:
                if self._must_map:
                    raise StoreError(f"{name!r} cannot be mapped: {error}. Pass mmap=False.") from error
        try:
            return CalledFile(path, name, size)
        except OSError as error:
            raise StoreError(f"{name!r} cannot be read: {error}. It was whole when the store was opened.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _unknown(self, id: Any) -> str:
        some = listed([repr(known) for known in self.index.ids[:3].tolist()])
        hint = (
            f" {unreadable(self.index)}"
            if self.index.bad
            else " The extraction is incomplete."
            if missing(self.path, self.identity, self.index) != []
            else ""
        )
        return f"no sample has the id {id!r}. There are {len(self)}: {some}, … Positions are slices: view[0:10].{hint}"


class _OpenShard:
    """An open shard, and what reads its layers' rows."""

    def __init__(self, file: MappedFile | CalledFile, columns: Mapping[str, Column]) -> None:
        self.file = file
        self._columns = columns
        self.readers: dict[str, ColumnReader] = {}

    def reader(self, key: str) -> ColumnReader:
        found = self.readers[key] = ColumnReader(self._columns[key], self.file)
        return found


def most_open() -> int:
    """Returns how many shards may be open. See Note: [Open shards]."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(min(limit // 4, _MOST_OPEN), 8)
