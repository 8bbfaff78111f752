"""Verifies the checksums of a store's shards, and sets bad shards aside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from convtap._dataset.index import read_index
from convtap._dataset.layout import RankFolder, rank_folders, set_aside, shard_files
from convtap._dataset.progress_bar import progress_bar
from convtap._dataset.shard_reader import Shard
from convtap._errors import StoreError, listed, plural, warn_user
from convtap._table import Table


def verify(path: Path, progress: bool) -> Table:
    """Reads every shard of a store. Returns ``(shard, problem)`` for each bad one."""
    index = read_index(path)
    bad = {**index.bad, **dict(_problems(path, index.files, progress))}
    checked = plural(len({*index.files, *bad}), "shard")
    title = f"{checked}, {len(bad)} bad" if bad else f"{checked}, all whole"
    remedy = "extract(..., resume=True) with the same arguments sets bad shards aside and computes their batches again."
    return Table(("shard", "problem"), sorted(bad.items()), title, [remedy] if bad else [])


def set_bad_aside(path: Path, own: RankFolder, part: int, parts: int, progress: bool) -> None:
    """Renames the bad shards of this process, so that they are computed again.

    A process checks its own folder and those of ranks of earlier, larger runs.
    """
    ranks = {name: int(name[5:]) for name in rank_folders(path)}
    files = [name for name in shard_files(path) if ranks[name.split("/")[0]] % parts == part]
    found = []
    for name, problem in _problems(path, files, progress, leave=False):
        folder = RankFolder(path, ranks[name.split("/")[0]])
        with ExitStack() as stack:
            if folder.path != own.path:
                try:
                    stack.enter_context(folder)
                except StoreError:  # another process has it
                    continue
            set_aside(path / name)
            found.append(f"{name} ({problem})")
    if found:
        warn_user(f"damaged shards were renamed to .bad, and their batches are computed again: {listed(found, 3)}.")


def _problems(path: Path, files: Iterable[str], progress: bool, leave: bool = True) -> Iterator[tuple[str, str]]:
    """Yields each bad shard and its problem."""
    names = list(files)
    for name in progress_bar(names, desc="verify", unit="shard", disable=not progress or not names, leave=leave):
        try:
            problem = Shard(path / name).problem()
        except StoreError as error:
            problem = str(error)
        if problem is not None:
            yield name, problem
