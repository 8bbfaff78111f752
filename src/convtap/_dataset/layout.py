"""The directory of a store, which holds its description and the ranks' folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

from convtap._atomic_write import TEMPORARY, replace_file, sync_folder, write_whole
from convtap._dataset.file_lock import lock_file
from convtap._errors import InvalidValue, StoreError, listed

VERSION = 1
DESCRIPTION = "store.json"
_KIND = "convtap store"
_SHARD = re.compile(r"shard-(\d{6,})\.safetensors")
_RANK = re.compile(r"rank-(\d{5,})")

# Note: [Locks]
# Assumption: one process at a time writes into a rank's folder.
# Failure: the data loader's forked workers inherit an flock and outlive a killed parent by seconds, so a resumed run would
#   find a locked folder into which no process writes.
# Choice: a POSIX record lock, which belongs to the process alone. It does not keep the process from locking twice, so this
#   set holds the folders that the process has locked.
_held: set[Path] = set()


def write_first(path: Path, content: bytes) -> None:
    """Writes a small file, unless another process has already written it."""
    with contextlib.suppress(FileExistsError):
        write_whole(path, lambda temporary: temporary.write_bytes(content), replace=False)


def _note(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content)
    write_whole(path, lambda temporary: temporary.write_text(text))


def read_description(path: Path) -> dict[str, Any]:
    """Reads ``store.json``.

    Raises:
        StoreError: the directory is missing, is not a store, is newer than this convtap, or has no extraction yet.
    """
    file = path / DESCRIPTION
    if not path.exists():
        raise StoreError(
            f"the directory {str(path)!r} does not exist. Write a store into it: extract(model, data, {str(path)!r})."
        )
    if not path.is_dir():
        raise StoreError(
            f"{str(path)!r} is a file, but a store is a directory. Read a file of acts.save with convtap.load(path)."
        )
    try:
        found = json.loads(file.read_bytes())
        kind, version = found["kind"], int(found["version"])
    except FileNotFoundError:
        shards = list(shard_files(path))
        if shards:
            raise StoreError(
                f"{str(path)!r} has {listed(shards, 2)} but no {DESCRIPTION}, so it is incomplete. Copy the whole directory."
            ) from None
        raise StoreError(
            f"{str(path)!r} is not a store, since it has no {DESCRIPTION}. Pass a directory that extract(...) has written."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{str(file)!r} is damaged, or convtap did not write it. Pass a directory that extract(...) has written."
        ) from None
    if kind != _KIND:
        raise StoreError(
            f"{str(file)!r} has the kind {kind!r}, so convtap did not write it. Pass the directory of a store."
        )
    if version > VERSION:
        raise StoreError(
            f"{str(path)!r} has format {version}, but this convtap reads up to {VERSION}. Update it: pip install -U convtap."
        )
    if not _is_whole(found.get("identity")):
        raise StoreError(
            f"{str(file)!r} is damaged, since its description of the extraction is incomplete. Copy the whole directory "
            "again, or extract into another one."
        )
    return found  # type: ignore[no-any-return]


def _is_whole(identity: Any) -> bool:
    """Whether the identity of a store has all entries that readers need."""
    if not isinstance(identity, dict):
        return False
    layers, data, given = identity.get("layers"), identity.get("data"), identity.get("given", [])
    named = isinstance(layers, list) and all(isinstance(layer, str) for layer in layers)
    batches = data.get("batches") if isinstance(data, dict) else "none"
    return named and isinstance(given, list) and isinstance(batches, (int, type(None)))


def prepare(path: Path, *, resume: bool) -> dict[str, Any] | None:
    """Makes a directory. Returns the identity of the store that it holds, or None.

    Raises:
        StoreError: the path is a file, holds other files, cannot be written, or is a store although ``resume=False``.
    """
    shown = str(path)
    if path.exists() and not path.is_dir():
        raise StoreError(f"into={shown!r} is a file. Pass the path of a directory, which may be new.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
        if DESCRIPTION not in names:
            # a run that failed before it wrote anything leaves a rank's empty folder
            others = [name for name in names if not _RANK.fullmatch(name)] or list(shard_files(path))
            if others and not (path / DESCRIPTION).exists():
                raise StoreError(
                    f"into={shown!r} is not a store, but holds {listed(others)}. Pass a new or empty directory."
                )
            return None
    except OSError as error:
        raise StoreError(f"into={shown!r} cannot be written: {error}. Pass a writable directory.") from error
    if not resume:
        raise StoreError(
            f"into={shown!r} is already a store, but resume=False begins a new one. Pass another directory, delete this "
            "one, or pass resume=True to compute only the missing batches."
        )
    identity: dict[str, Any] = read_description(path)["identity"]
    return identity


def describe(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Writes the identity of a store, unless it has one. Returns the one it has."""
    content = {"kind": _KIND, "version": VERSION, "identity": identity}
    if not (path / DESCRIPTION).exists():
        write_first(path / DESCRIPTION, json.dumps(content, indent=1).encode())
    found: dict[str, Any] = read_description(path)["identity"]
    return found


def shard_files(path: Path) -> dict[str, tuple[int, int]]:
    """Returns the size and the time in ns of each shard, by its path in the store."""
    found = {}
    for rank in rank_folders(path):
        with os.scandir(path / rank) as entries:
            for entry in entries:
                if _SHARD.fullmatch(entry.name):
                    state = entry.stat()
                    found[f"{rank}/{entry.name}"] = (state.st_size, state.st_mtime_ns)
    return dict(sorted(found.items()))


def rank_folders(path: Path) -> list[str]:
    """Lists the ranks' folders."""
    return sorted(entry.name for entry in os.scandir(path) if _RANK.fullmatch(entry.name))


class RankFolder:
    """The folder of one rank, locked inside the context.

    Entering it removes half-written files of a killed process.

    Raises:
        StoreError: another process has locked it, or the file system has no locks.
    """

    def __init__(self, store: Path, rank: int) -> None:
        self.path = (store / f"rank-{rank:05d}").absolute()
        self._handle: int | None = None

    def __enter__(self) -> RankFolder:
        self.path.mkdir(exist_ok=True)
        self._handle = self._lock()
        for entry in self.path.glob(TEMPORARY):
            with contextlib.suppress(OSError):
                entry.unlink()
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            _held.discard(self.path)

    def _lock(self) -> int:
        if self.path in _held:
            raise self._refusal(f"this process ({os.getpid()})")
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_locked = lock_file(handle)
        except OSError as error:
            os.close(handle)
            raise StoreError(
                f"{str(self.path)!r} cannot be locked ({error.strerror}). Pass a directory on a file system with file "
                "locks, and copy the store when the run has ended."
            ) from error
        if not is_locked:
            owner = b""
            with contextlib.suppress(OSError):  # Windows keeps other processes from reading locked bytes
                owner = os.read(handle, 200)
            os.close(handle)
            raise self._refusal(owner.decode(errors="replace") or "another process")
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held.add(self.path)
        return handle

    def _refusal(self, owner: str) -> StoreError:
        return StoreError(
            f"{owner} is extracting into {str(self.path)!r}, and only one process at a time can write into a rank's folder. "
            "Wait for it, pass another directory, or compute a part in each process: extract(..., part=(i, n)), or under "
            "torchrun torch.distributed.init_process_group() first."
        )

    def next_number(self) -> int:
        """Returns the number of the next shard, larger than any used before."""
        numbers = [int(match[1]) for entry in self.path.iterdir() if (match := _SHARD.match(entry.name))]
        return max(numbers, default=-1) + 1


def check_part(part: Any) -> tuple[int, int]:
    """Checks ``part=(i, n)``.

    Raises:
        InvalidValue: ``part`` is not a pair of ints with 0 <= i < n.
    """
    try:
        i, n = part
        good = isinstance(i, int) and isinstance(n, int) and 0 <= i < n
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InvalidValue(
            f"part={part!r} is not (i, n) with 0 <= i < n. Pass the i-th of n parts, such as part=(3, 100) for the fourth."
        )
    return part[0], part[1]


def note_part(folder: RankFolder, part: int, parts: int) -> None:
    """Notes in a rank's folder the part that its process computes."""
    _note(folder.path / "part.json", {"part": part, "parts": parts})


def read_note(file: Path) -> dict[str, Any]:
    """Reads a note. It is empty if missing or damaged, since no row depends on it."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def read_parts(path: Path) -> int:
    """Returns the number of parts of the latest run."""
    files = [path / rank / "part.json" for rank in rank_folders(path)]
    noted = [(file, read_note(file).get("parts")) for file in files]
    return max(((file.stat().st_mtime_ns, parts) for file, parts in noted if isinstance(parts, int)), default=(0, 1))[1]


def write_finished(folder: Path, batches: int) -> None:
    """Notes in a rank's folder how many batches the data has."""
    _note(folder / "finished.json", {"batches": batches})


def read_finished(path: Path) -> int | None:
    """Returns how many batches the data has, if a rank has reached its end."""
    found = (read_note(path / rank / "finished.json").get("batches") for rank in rank_folders(path))
    return next((batches for batches in found if isinstance(batches, int)), None)


def write_padding(folder: Path, layers: dict[str, str]) -> None:
    """Notes in a rank's folder which layers' frames depend on padding, and why."""
    known = read_note(folder / "padding.json")
    if not layers.items() <= known.items():
        _note(folder / "padding.json", {**known, **layers})


def read_padding(path: Path) -> dict[str, str]:
    """Returns all ranks' notes on padded batches, by layer."""
    notes = [read_note(path / rank / "padding.json") for rank in rank_folders(path)]
    return {layer: str(cause) for note in notes for layer, cause in note.items()}


def set_aside(shard: Path) -> Path:
    """Renames a bad shard, so that it is not read and its number is not used again.

    Raises:
        StoreError: the shard cannot be renamed, as on Windows if any process has it open.
    """
    target = shard.with_name(f"{shard.name}.bad")
    try:
        replace_file(shard, target)
    except OSError as error:
        raise StoreError(
            f"{str(shard)!r} is damaged and cannot be set aside: {error}. Close the stores that read it, in all processes, "
            "and run the same call again."
        ) from error
    sync_folder(shard.parent)
    return target
