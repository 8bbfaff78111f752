"""Finds samples by id, and keeps some of a store's shards open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convtap._dataset.column import Column, ColumnReader
from convtap._dataset.file_system import is_on_network
from convtap._dataset.index import read_index
from convtap._dataset.layout import read_description
from convtap._dataset.sample_positions import SamplePositions
from convtap._dataset.shard_file import CalledFile, MappedFile, changed
from convtap._dataset.shard_reader import Shard
from convtap._dataset.summary import missing, unreadable
from convtap._errors import InvalidValue, OutOfRange, StoreError, listed

# Note: [Open shards]
# Assumption: an open shard takes a file descriptor, even if it is mapped.
# Failure: a store can have more shards than a process may open files, which is 1,024 on many systems.
# Choice: keep a quarter of that number open, 4,096 at most. The index holds the places of each layer's rows, so opening a
#   shard again does not read its header.
_MOST_OPEN = 4096


class StoreReader:
    """Reads shards for a store and its views.

    Args:
        path: the directory of the store.
        mapped: whether to map shards; None to decide by the file system.
        copies: whether to copy rows out of a map.

    Attributes:
        path, copies: as above.
        identity: the arguments of the extraction.
        index: where every sample lies.
    """

    def __init__(self, path: Path, mapped: bool | None = None, copies: bool = True) -> None:
        if mapped is False and not copies:
            raise InvalidValue(
                "copy=False has no effect with mmap=False, which reads rows into memory of their own. Remove one of them."
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
        """Returns the position of an id in the order of the samples.

        Raises:
            OutOfRange: the store has no sample with this id.
            StoreError: several samples have this id.
        """
        position = self._positions.find(id)
        if position is None:
            raise OutOfRange(self._unknown(id))
        return position

    def positions(self, ids: Any) -> Any:
        """Returns an array of the positions of an array of ids; see ``position``."""
        found = self._positions.find_all(ids)
        if len(found) and found.min() < 0:
            raise OutOfRange(self._unknown(ids[found < 0].tolist()[0]))
        return found

    def column(self, number: int, key: str) -> ColumnReader:
        """Returns the reader of a layer's rows in a shard. See Note: [Open shards]."""
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._opened(number)
            while len(self._open) > most_open():
                self._open.pop(next(iter(self._open)), None)
        return shard.readers.get(key) or shard.reader(key)

    def shard(self, number: int) -> Shard:
        """Reads the header of a shard again, by the shard's number.

        Raises:
            StoreError: the shard has changed since the store was opened, or cannot be read.
        """
        name = self.index.names[number]
        try:
            shard = Shard(f"{self.path}/{name}")
        except StoreError as error:
            raise changed(name, error) from error
        if {key: shard.column(key) for key in shard.columns} != self.index.columns[number]:
            raise StoreError(f"{name!r} was replaced after the store was opened. Open it again: Store(path).")
        return shard

    def _opened(self, number: int) -> _OpenShard:
        name = self.index.names[number]
        path, known = self.path / name, self.index.files[name]
        try:
            state = path.stat()
        except OSError as error:
            raise changed(name, error) from error
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
            raise changed(name, error) from error

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
        return (
            f"no sample has the id {id!r}. Pass one of the {len(self)} ids ({some}, …), or a slice of positions: view[0:10]."
            f"{hint}"
        )


class _OpenShard:
    """An open shard, with the readers of its layers' rows."""

    def __init__(self, file: MappedFile | CalledFile, columns: Mapping[str, Column]) -> None:
        self.file = file
        self._columns = columns
        self.readers: dict[str, ColumnReader] = {}

    def reader(self, key: str) -> ColumnReader:
        found = self.readers[key] = ColumnReader(self._columns[key], self.file)
        return found


def most_open() -> int:
    """Returns the largest number of open shards. See Note: [Open shards]."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(min(limit // 4, _MOST_OPEN), 8)
