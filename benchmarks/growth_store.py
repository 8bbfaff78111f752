"""Measures reads of a store beside np.memmap, safetensors, h5py and zarr.

It also measures how a store grows. The figures are medians of interleaved rounds in one process, with the middle half in
brackets and the files in the system's cache. Peak memory is that of a separate process. ``python -m benchmarks.growth_store
[--rounds 15]`` writes the section "Reading a store" of ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import datasets, works
from benchmarks.harness import environment, interleave, markdown, paired_ratio, quartiles, write_section
from benchmarks.scale import Zeros
from convtap import Store, extract
from convtap._dataset.layout import describe
from convtap._dataset.shard_format import Batch, write_shard

#: Returns a row by its number, as a tensor.
Read = Callable[[int], Tensor]
#: The number of rows and the shape of a row, by size.
SIZES = {"512 B": (100_000, (8, 16)), "256 kB": (400, (64, 1000))}
BATCH = 256


def written(path: Path, rows: Tensor, shard_bytes: int = 32_000_000, batch: int = 100) -> Path:
    """Writes a store of one layer, in the format of ``extract``."""
    (path / "rank-00000").mkdir(parents=True)
    describe(path, {"layers": ["conv"], "calls": "error", "data": {"batches": len(rows) // batch}, "given": []})
    held: list[Batch] = []
    for number, some in enumerate(rows.split(batch)):
        held.append(Batch(number, list(range(number * batch, number * batch + len(some))), {"conv": some}))
        if sum(one.nbytes for one in held) >= shard_bytes or (number + 1) * batch >= len(rows):
            name = f"shard-{len(list((path / 'rank-00000').iterdir())):06d}.safetensors"
            write_shard(path / "rank-00000" / name, held)
            held = []
    return path


def memmap(folder: Path, rows: Tensor) -> Any:
    rows.numpy().tofile(folder / "rows.bin")
    return np.memmap(folder / "rows.bin", np.float32, "r", shape=tuple(rows.shape))


def peers(folder: Path, rows: Tensor) -> dict[str, Read]:
    """Returns each library's reader of a row, as a tensor that owns its memory."""
    store = written(folder / "store", rows)
    views = {
        "convtap": Store(store)["conv"],
        "convtap, mmap=False": Store(store, mmap=False)["conv"],
        "convtap, copy=False": Store(store, copy=False)["conv"],
    }
    found: dict[str, Read] = {name: view.__getitem__ for name, view in views.items()}
    mapped = memmap(folder, rows)
    found["np.memmap"] = lambda i: torch.from_numpy(np.array(mapped[i]))
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"rows": rows}, folder / "rows.safetensors")
    part = safe_open(str(folder / "rows.safetensors"), "pt").__enter__().get_slice("rows")
    found["safetensors"] = lambda i: part[i]
    if importlib.util.find_spec("h5py"):
        import h5py

        file = h5py.File(folder / "rows.h5", "w")
        data = file.create_dataset("rows", data=rows.numpy())
        found["h5py"] = lambda i: torch.from_numpy(data[i])
    if importlib.util.find_spec("zarr"):
        import zarr

        chunks = (max(1, 32_000 // (4 * rows[0].numel())), *rows.shape[1:])
        array = zarr.create_array(
            str(folder / "rows.zarr"), shape=rows.shape, dtype="f4", chunks=chunks, compressors=None
        )
        array[:] = rows.numpy()
        found["zarr"] = lambda i: torch.from_numpy(array[i])
    return found


def spread(seconds: Sequence[float], unit: float, digits: int = 1) -> str:
    low, middle, high = (value * unit for value in quartiles(seconds))
    return f"{middle:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})"


def rate(seconds: Sequence[float], count: int) -> str:
    return spread([1 / value for value in seconds], count, 0)


def beside(
    seconds: Mapping[str, Sequence[float]], shown: Callable[[Sequence[float]], str], other: str
) -> list[list[str]]:
    """Returns a line for each case with its time, and its speed relative to the other."""
    return [[name, shown(values), f"{paired_ratio(seconds[other], values):.2f}"] for name, values in seconds.items()]


def random_reads(folder: Path, rounds: int) -> str:
    """Reads rows in random order, one by one."""
    parts = []
    for size, (count, shape) in SIZES.items():
        rows = torch.randn(count, *shape)
        (where := folder / size.replace(" ", "")).mkdir()
        readers = peers(where, rows)
        order = torch.randperm(count)[:400].tolist()
        for name, read in readers.items():
            assert all(torch.equal(read(i), rows[i]) for i in order[:20]), name
        few = {"zarr": 20}

        def reading(name: str, read: Read, order: list[int] = order, few: dict[str, int] = few) -> Callable[[], None]:
            chosen = order[: few.get(name, len(order))]
            return lambda: [None for i in chosen if read(i) is None]  # type: ignore[return-value]

        seconds = interleave({name: reading(name, read) for name, read in readers.items()}, rounds)
        for name in seconds:
            seconds[name] = [value / few.get(name, len(order)) for value in seconds[name]]
        table = beside(seconds, lambda values: spread(values, 1e6), "np.memmap")
        parts.append(markdown((f"a row of {size}", "µs", "speed, × np.memmap"), table))
    return "\n\n".join(parts)


class Rows(Dataset):
    """Yields the rows of a memory map, one by one."""

    def __init__(self, mapped: Any) -> None:
        self.mapped = mapped

    def __len__(self) -> int:
        return len(self.mapped)

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(self.mapped[i]))


def loaders(folder: Path, rounds: int) -> str:
    """Reads rows of 512 B with a shuffling ``DataLoader``, and batches alone."""
    count, shape = 50_000, SIZES["512 B"][1]
    rows = torch.randn(count, *shape)
    folder.mkdir()
    data, loop = Store(written(folder / "store", rows)).dataset(), Rows(memmap(folder, rows))
    parts = []
    for workers in (0, 2):

        def epoch(one: Any, workers: int = workers, collate: Any = None) -> Callable[[], object]:
            loader = DataLoader(one, BATCH, shuffle=True, num_workers=workers, collate_fn=collate)
            return lambda: sum(1 for _ in loader)

        cases = {
            "np.memmap": epoch(loop),
            "convtap": epoch(data),
            "convtap, its collate": epoch(data, collate=data.collate),
        }
        seconds = interleave(cases, max(rounds // 3, 3), 1)
        table = beside(seconds, lambda values: rate(values, count), "np.memmap")
        parts.append(markdown((f"DataLoader, {workers} workers", "samples/s", "speed, × np.memmap"), table))
    order = torch.randperm(count)[: 20 * BATCH].tolist()
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    view = data._layers[0]

    def epoch_of(read: Callable[[list[int]], Any]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:  # a training loop also drops each batch
                read(batch)

        return run

    cases = {
        "a loop over np.memmap": epoch_of(lambda batch: [loop[i] for i in batch]),
        "`store.dataset().__getitems__`": epoch_of(data.__getitems__),
        "`store[layer][ids]`": epoch_of(lambda batch: view.each(np.array(batch))),
        "`np.memmap[ids]`, one array": epoch_of(lambda batch: torch.from_numpy(np.array(loop.mapped[batch]))),
    }
    seconds = interleave(cases, rounds)
    table = beside(seconds, lambda values: rate(values, len(order)), "a loop over np.memmap")
    return "\n\n".join([*parts, markdown((f"batches of {BATCH} rows", "samples/s", "speed, × the loop"), table)])


def many(folder: Path, shards: int) -> tuple[Path, Callable[[], Any]]:
    """Returns a store of 8 layers, 1,000 samples a shard, and the call that made it."""

    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv1d(1, 1, 1) for _ in range(8))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [conv(x) for conv in self.convs]

    torch.manual_seed(0)
    model, path = Eight(), folder / str(shards)

    def run() -> Store:
        options: dict[str, Any] = {"collate_fn": lambda rows: rows, "dtype": torch.float16, "progress": False}
        return extract(model, Zeros(1000 * shards), path, batch_size=1000, shard_bytes=1, **options)

    with mock.patch.object(os, "fsync"):
        run()
    return path, run


def growth(folder: Path, rounds: int) -> str:
    """Opens and resumes stores of more and more shards."""
    counts = (125, 250, 500, 1000, 2000)
    folder.mkdir()
    stores = {count: many(folder, count) for count in counts}
    opening = interleave({str(count): lambda count=count: Store(stores[count][0]) for count in counts}, rounds, 1)
    resumed = interleave({str(count): stores[count][1] for count in counts}, max(rounds // 3, 3), 1)
    table = [
        [f"{count:,}", f"{1000 * count:,}", spread(opening[str(count)], 1e3), spread(resumed[str(count)], 1e3)]
        for count in counts
    ]
    slopes = [slope(counts, [statistics.median(found[str(count)]) for count in counts]) for found in (opening, resumed)]
    table.append(["log-log slope", "", *(f"{value:.2f}" for value in slopes)])
    return markdown(("shards", "samples", "open, ms", "resume, ms"), table)


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the exponent of the growth: 1 if time is proportional to size."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    return statistics.linear_regression(x, y).slope


def many_shards(folder: Path, rounds: int) -> str:
    """Reads random rows of a store with more shards than a process may open files."""
    count, shape = SIZES["512 B"]
    rows = torch.randn(count, *shape)
    folder.mkdir()
    store = Store(written(folder / "store", rows, shard_bytes=1))
    mapped, order = memmap(folder, rows), torch.randperm(count)[:400].tolist()
    view, data = store["conv"], store.dataset()
    cases = {
        "np.memmap of one file": lambda: [torch.from_numpy(np.array(mapped[i])) for i in order],
        "convtap, one by one": lambda: [view[i] for i in order],
        "convtap, in batches": lambda: [
            data.__getitems__(order[first : first + BATCH]) for first in range(0, 400, BATCH)
        ],
    }
    seconds = {name: [value / len(order) for value in values] for name, values in interleave(cases, rounds).items()}
    table = beside(seconds, lambda values: spread(values, 1e6), "np.memmap of one file")
    head = f"{len(list((folder / 'store' / 'rank-00000').iterdir())):,} shards, 512 B a row"
    return markdown((head, "µs a row", "speed, × np.memmap"), table)


def child(shard_bytes: str) -> None:
    """Extracts 0.64 GB in this process, and prints the time and memory."""
    torch.manual_seed(0)
    work = works.five()
    work.plain()
    data = TensorDataset(torch.randn(500, *work.x.shape[1:]))
    options = {} if shard_bytes == "default" else {"shard_bytes": shard_bytes}
    before, folder = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Path(tempfile.mkdtemp())
    try:
        os.sync()
        begun, cpu = time.perf_counter(), time.process_time()
        extract(work.model, data, folder / "s", work.names, batch_size=datasets.BATCH, progress=False, **options)
        cpu = time.process_time() - cpu
        os.sync()
        seconds = time.perf_counter() - begun
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        files = len(list((folder / "s").rglob("shard-*")))
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "files": files}))


def shard_sizes(rounds: int) -> str:
    sizes = ("default", "16MB", "64MB", "128MB", "256MB")  # the default is 32MB
    found: dict[str, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.growth_store", "--extract", size]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[size].append(json.loads(done.stdout.splitlines()[-1]))
    table = []
    for size, runs in found.items():
        cells = [
            spread([run[key] for run in runs], 1, digits) for key, digits in (("seconds", 1), ("cpu", 1), ("peak", 0))
        ]
        table.append([size, runs[0]["files"], *cells])
    return markdown(("shard_bytes", "files", "s", "CPU s", "peak MiB above plain"), table)


def main() -> None:
    """Measures all cases and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--extract", metavar="SHARD_BYTES", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.extract:
        child(options.extract)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        parts = {
            "Extracting 0.64 GB: the size of a shard": shard_sizes(max(options.rounds // 3, 3)),
            "Rows in random order": random_reads(folder, options.rounds),
            "Training: rows of 512 B, shuffled": loaders(folder / "loaders", options.rounds),
            "More shards than may be open": many_shards(folder / "many", options.rounds),
            "Opening and resuming, 8 layers": growth(folder / "growth", options.rounds),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    head = (
        f"`python -m benchmarks.growth_store`. {environment()}, {options.rounds} rounds, files in the system's cache."
    )
    write_section("Reading a store", "\n\n".join([head, *(f"### {title}\n\n{body}" for title, body in parts.items())]))


if __name__ == "__main__":
    main()
