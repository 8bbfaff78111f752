"""Measures the costs of a store of many samples beside their bytes.

These are the files, the index, opening the store, and finding the missing batches. The outputs are as small as possible, so
that all other costs show. ``python -m benchmarks.scale`` writes the section "Scale" of ``RESULTS.md``, the source of the
figures in ``docs/scale.md``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness import environment, markdown, write_section
from convtap._dataset.batches import Even, MapPlan
from convtap._dataset.extract import extract
from convtap._dataset.index import read_index
from convtap._dataset.job import _Done
from convtap._dataset.layout import describe, shard_files
from convtap._dataset.shard_format import Batch, write_shard
from convtap._dataset.store import Store


class Zeros:
    """A data set of the smallest samples, which makes whole batches at once."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.zeros(len(indices), 1, 1)

    def __getitem__(self, i: int) -> Tensor:
        return torch.zeros(1, 1)


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _index_bytes(index: Any) -> int:
    return int(sum(array.nbytes for array in (index.batches, index.present, index.ids, index.starts)))


def samples(length: int, batch: int) -> list[str]:
    """Extracts one layer with one float16 number a sample."""
    folder = Path(tempfile.mkdtemp())
    try:
        run = lambda: extract(  # noqa: E731
            nn.Conv1d(1, 1, 1),
            Zeros(length),
            folder,
            batch_size=batch,
            collate_fn=lambda rows: rows,
            dtype=torch.float16,
            progress=False,
        )
        seconds = _seconds(run)
        disk = sum(size for size, _ in shard_files(folder).values())
        return [
            f"{length:,}",
            f"{batch}",
            f"{disk / length:.2f}",
            f"{_index_bytes(read_index(folder)) / length:.2f}",
            f"{1e3 * seconds / (length / batch):.2f}",
        ]
    finally:
        shutil.rmtree(folder)


def shards(count: int, batches: int, rows: int, ranks: int, layers: int = 8) -> list[str]:
    """Many shards, opened."""
    folder = Path(tempfile.mkdtemp())
    try:
        identity = {"layers": [], "calls": "error", "data": {"batches": count * batches}, "given": []}
        describe(folder, identity)
        for rank in range(ranks):
            (folder / f"rank-{rank:05d}").mkdir()
        number = 0
        with mock.patch.object(os, "fsync"):
            for shard in range(count):
                content = []
                for _ in range(batches):
                    ids = range(number * rows, (number + 1) * rows)
                    columns = {f"layer{k}": torch.zeros(rows, 1, dtype=torch.float16) for k in range(layers)}
                    content.append(Batch(number, ids, columns))
                    number += 1
                name = f"rank-{shard % ranks:05d}/shard-{shard // ranks:06d}.safetensors"
                write_shard(folder / name, content)
        opening = _seconds(lambda: Store(folder))
        listing = _seconds(lambda: shard_files(folder))
        return [
            f"{count:,}",
            f"{batches:,}",
            f"{rows}",
            f"{ranks}",
            f"{1e6 * listing / count:.0f}",
            f"{1e3 * opening / count:.2f}",
        ]
    finally:
        shutil.rmtree(folder)


def start(batches: int) -> list[str]:
    """Measures the search of a process for its missing batches."""
    import numpy as np

    here = np.zeros((batches, 4), np.int64)
    here[:, 0] = np.arange(batches)
    planned = MapPlan(Zeros(batches * 16), Even(batches * 16, 16), {})
    done = _Done(type("Index", (), {"batches": here})())
    parts = [lambda n: n % 1000 == 5, lambda n: n % 1000 == 5 and n not in done, lambda n: n not in done]
    return [f"{batches:,}", f"{sum(_seconds(lambda part=part: planned.count(part)) for part in parts):.2f}"]


def main() -> None:
    """Measures all cases and writes the section."""
    torch.set_num_threads(1)
    table = [samples(10**4, 16), samples(10**5, 16), samples(10**5, 256), samples(10**6, 256)]
    first = markdown(("samples", "batch", "disk B a sample", "index B a sample", "ms a batch"), table)
    cases = [(1000, 10, 32, 1), (1000, 10, 32, 100), (4000, 10, 32, 100), (100, 140, 256, 20), (100, 2200, 16, 20)]
    columns = (
        "shards",
        "batches each",
        "samples a batch",
        "ranks",
        "list, µs a shard",
        "open, ms a shard",
    )
    second = markdown(columns, [shards(*case) for case in cases])
    third = markdown(("batches", "s to find what is missing"), [start(10**6)])
    head = f"`python -m benchmarks.scale`. {environment()}. One float16 number a sample."
    write_section("Scale", "\n\n".join((head, first, second, third)))


if __name__ == "__main__":
    sys.exit(main())
