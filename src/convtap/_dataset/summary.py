"""Summarizes the layers of a store and its missing or unreadable batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from convtap._dataset.index import Index
from convtap._dataset.layout import rank_folders, read_finished, read_padding, read_parts
from convtap._errors import listed, plural
from convtap._select.parts import split_key
from convtap._table import Table, human_bytes


def missing(path: Path, identity: Mapping[str, Any], index: Index) -> list[int] | None:
    """Returns the missing batches, or None if the number of batches is unknown."""
    count = identity["data"].get("batches")
    if count is None:
        count = read_finished(path)
    if count is None:
        return None
    here = index.numbers
    return [] if len(here) == count else [number for number in range(count) if number not in here]


def summary(path: Path, identity: Mapping[str, Any], index: Index, names: Mapping[str, str], most: int | None) -> Table:
    """Returns a table of the layers; ``names`` maps their shown names to their keys."""
    rows: list[tuple[Any, ...]] = []
    counts = dict(zip(index.layers, (index.present * index.batches[:, 1:2]).sum(0).tolist(), strict=True))
    for shown, key in names.items():
        layer = index.layers[key]
        size = layer.elements * getattr(torch, layer.dtype.split("|")[0]).itemsize
        shape = "varies" if layer.shape is None else str(tuple(layer.shape)).replace("None", "…")
        rows.append((shown, counts[key], shape, layer.dtype, human_bytes(size)))
    layers = set(identity["layers"])
    split = [split_key(key, layers) for key in index.layers]
    ran = {name for layer, _, part in split for name in (layer, layer + part)}
    rows.extend((name, 0, "", "did not run", "") for name in identity["layers"] if index.names and name not in ran)
    total = human_bytes(sum(size for size, _ in index.files.values()))
    title = f"{path}: {plural(len(index.ids), 'sample')}, {plural(len(index.files), 'shard')}, {total}"
    columns = ("layer", "samples", "shape", "dtype", "bytes")
    whole = "print(store.summary(rows=None))"
    return Table(columns, rows, title, _notes(path, identity, index), most=most, whole=whole)


def _notes(path: Path, identity: Mapping[str, Any], index: Index) -> list[str]:
    notes = []
    ranks = _ranks(path, index)
    if len(ranks) > 1:
        fewest, most = min(ranks.values()), max(ranks.values())
        notes.append(f"written by {len(ranks)} ranks, {f'{fewest} to ' if fewest < most else ''}{_batches(most)} each")
    absent = missing(path, identity, index)
    if absent is None:
        notes.append("incomplete: the extraction has not reached the end of its data; run it again to resume")
    elif absent:
        total = _batches(len(absent) + len(index.batches))
        notes.append(
            f"incomplete: {len(absent)} of {total} missing ({_ranges(absent)}); run the extraction again to compute them"
        )
        notes.extend(_undone(absent, read_parts(path), ranks))
    double = len(index.duplicates)
    if double:
        shards = sorted({index.names[shard] for _, shard in index.duplicates.tolist()})
        notes.append(f"{_batches(double)} stored twice: the later copies, in {listed(shards, 3)}, are not used")
    if "ids" in identity.get("given", ()) and (several := _several(index)):
        notes.append(f"{plural(len(several), 'id')} of several samples each: {listed(map(repr, several), 3)}")
    padding = read_padding(path)
    if padding:
        causes = listed((f"{cause} ({layer})" for layer, cause in padding.items()), 3)
        notes.append(
            f"padded batches: the frames of {plural(len(padding), 'layer')} are not those of each input alone: {causes}"
        )
    assumed = [key for key, layer in index.layers.items() if layer.is_assumed]
    if assumed:
        notes.append(f"the time axis is unknown, so the last axis is used: {listed(assumed, 4)}")
    if index.bad:
        notes.append(unreadable(index))
    return notes


def _ranks(path: Path, index: Index) -> dict[int, int]:
    """Returns the number of batches in each rank's folder."""
    import numpy as np

    counts = np.bincount(index.batches[:, 2], minlength=len(index.names)).tolist()
    ranks = {int(folder[5:]): 0 for folder in rank_folders(path)}
    for name, count in zip(index.names, counts, strict=True):
        ranks[int(name[5:].partition("/")[0])] += count
    return ranks


def _undone(absent: list[int], parts: int, ranks: Mapping[int, int]) -> list[str]:
    """Describes the ranks with missing batches, if the latest run had several ranks."""
    if parts == 1:
        return []
    owners = Counter(number % parts for number in absent)
    said = [
        f"rank {rank} ({_batches(count)}{'' if ranks.get(rank) else ', nothing written'})"
        for rank, count in sorted(owners.items())
    ]
    return [f"{len(said)} of {parts} ranks {'is' if len(said) == 1 else 'are'} not done: {listed(said, 6)}"]


def _several(index: Index) -> list[Any]:
    """Returns the ids of several samples, which one rank alone cannot find."""
    import numpy as np

    ids = np.sort(index.ids)
    return np.unique(ids[1:][ids[1:] == ids[:-1]]).tolist()  # type: ignore[no-any-return]


def unreadable(index: Index) -> str:
    """Describes the shards that cannot be read."""
    bad = listed([f"{name} ({problem})" for name, problem in index.bad.items()], 3)
    return (
        f"{len(index.bad)} of {plural(len(index.bad) + len(index.files), 'shard')} cannot be read, so their samples are "
        f"missing: {bad}. Compute them again with extract(..., resume=True)."
    )


def stem(key: str, layers: Container[str]) -> str:
    """Returns a key without the number of its call, but with the path in a structure."""
    layer, _, part = split_key(key, layers)
    return layer + part


def _batches(count: int) -> str:
    return f"{count} batch{'' if count == 1 else 'es'}"


def _ranges(numbers: list[int], limit: int = 6) -> str:
    """Writes numbers as ranges: ``3, 7–9``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    texts = [str(first) if first == last else f"{first}–{last}" for first, last in found]
    return ", ".join(texts[:limit]) + (", …" if len(texts) > limit else "")
