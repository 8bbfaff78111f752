"""Measures ``extract`` against forward passes alone, writes alone, and hooks.

Each case runs in a process of its own, which has its own peak memory. Rounds over all cases spread a drift of the machine
evenly. ``python -m benchmarks.extract [--rounds 3] [--threads 1]`` writes the section "Extract" of ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.harness import declare_torchvision_operators, environment, markdown, write_section

HEAD = (
    '`python -m benchmarks.extract`. "extract" runs the whole model, "stopping" ends the forward after the last convolution '
    '(`stop=True`), "write" writes the same bytes and forces them to the disk, "idiom" collects in lists and saves at the end.'
)
CASES = ("forward", "write", "extract", "stopping", "idiom")


class Noise(Dataset):
    """Samples of one second of sound, made when they are read, to save memory."""

    def __init__(self, length: int, shape: tuple[int, ...]) -> None:
        self.length = length
        self.shape = shape

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(i))


def encoder() -> nn.Module:
    """wav2vec2-base with random weights: 13 MB of outputs a second of sound."""
    declare_torchvision_operators()
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config()).eval()


def light() -> nn.Module:
    """Three cheap convolutions with large outputs of 12 MB a sample."""
    return nn.Sequential(nn.Conv1d(1, 64, 1), nn.Conv1d(64, 64, 1, groups=64), nn.Conv1d(64, 64, 1, groups=64)).eval()


WORKLOADS = {
    "wav2vec2-base, 1 s": (encoder, (16000,), 4),
    "three light layers": (light, (1, 16000), 4),
}


def batches(data: Noise, size: int):
    for start in range(0, len(data), size):
        yield torch.stack([data[i] for i in range(start, min(start + size, len(data)))])


def hooked(model: nn.Module):
    """Collects outputs with hooks, in a list for each layer."""
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            module.register_forward_hook(
                lambda m, a, output, name=name: kept.setdefault(name, []).append(output.clone())
            )
    return kept


def forward(model: nn.Module, data: Noise, size: int, folder: Path) -> None:
    with torch.inference_mode():
        for batch in batches(data, size):
            model(batch)


def write(model: nn.Module, data: Noise, size: int, folder: Path) -> float:
    """Writes the bytes of one batch repeatedly, in files of about the size of a shard."""
    kept = hooked(model)
    with torch.inference_mode():
        model(next(batches(data, size)))
    buffers = [memoryview(t.contiguous().reshape(-1).numpy()).cast("B") for tensors in kept.values() for t in tensors]
    repeats = len(data) // size
    per_file = max(32_000_000 // sum(map(len, buffers)), 1)
    started = time.perf_counter()
    for first in range(0, repeats, per_file):
        with open(folder / str(first), "wb", buffering=0) as file:
            for _ in range(min(per_file, repeats - first)):
                for buffer in buffers:
                    file.write(buffer)
            os.fsync(file.fileno())
    return time.perf_counter() - started


def extract(model: nn.Module, data: Noise, size: int, folder: Path) -> None:
    from convtap._dataset.extract import extract as run

    run(model, data, folder / "store", batch_size=size, progress=False)


def stopping(model: nn.Module, data: Noise, size: int, folder: Path) -> None:
    """Extracts with ``stop=True``, which ends each pass after the last convolution."""
    from convtap._dataset.extract import extract as run

    run(model, data, folder / "store", nn.Conv1d, batch_size=size, stop=True, progress=False)


def idiom(model: nn.Module, data: Noise, size: int, folder: Path) -> None:
    kept = hooked(model)
    with torch.inference_mode():
        for batch in batches(data, size):
            model(batch)
    torch.save({name: torch.cat(tensors) for name, tensors in kept.items()}, folder / "all.pt")
    with open(folder / "all.pt", "rb") as file:
        os.fsync(file.fileno())


def child(case: str, workload: str, samples: int, threads: int) -> None:
    """Runs one case once, and prints its seconds, bytes on disk and peak memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make, shape, size = WORKLOADS[workload]
    model = make()
    forward(model, Noise(size, shape), size, Path())  # warm
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR")))
    try:
        started, before = time.perf_counter(), time.process_time()
        seconds = globals()[case](model, Noise(samples, shape), size, folder) or time.perf_counter() - started
        cpu = time.process_time() - before
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": written, "peak": peak}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(case: str, workload: str, samples: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.extract", "--case", case, "--workload", workload]
    done = subprocess.run(
        [*command, "--samples", str(samples), "--threads", str(threads)], capture_output=True, text=True, check=True
    )
    os.sync()
    return json.loads(done.stdout.splitlines()[-1])


def times(workload: str, samples: int, threads: int, rounds: int) -> str:
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            found[case].append(measure(case, workload, samples, threads))
    slower = [max(f["seconds"], w["seconds"]) for f, w in zip(found["forward"], found["write"], strict=True)]
    rows = []
    for case in CASES:
        runs = found[case]
        seconds = statistics.median(run["seconds"] for run in runs)
        written = runs[0]["bytes"]
        ratio = statistics.median(run["seconds"] / s for run, s in zip(runs, slower, strict=True))
        rows.append(
            (
                case,
                f"{seconds:.2f}",
                f"{min(r['seconds'] for r in runs):.2f}–{max(r['seconds'] for r in runs):.2f}",
                f"{statistics.median(run['cpu'] for run in runs):.2f}",
                f"{written / 1e6:.0f}",
                f"{written / seconds / 1e6:.0f}" if written else "",
                f"{statistics.median(run['peak'] for run in runs) / 1e6:.0f}",
                f"{ratio:.2f}",
            )
        )
    head = f"{workload}, {samples} samples, {threads} thread(s), {rounds} rounds"
    return f"{head}\n\n" + markdown(
        (
            "case",
            "seconds",
            "range",
            "CPU seconds",
            "MB on disk",
            "MB/s",
            "peak MB",
            "× the slower of forward and write",
        ),
        rows,
    )


def memory(workload: str, samples: int, threads: int) -> str:
    rows = []
    for times in (1, 4, 16):
        row = [f"{times}× ({samples * times} samples)"]
        for case in ("forward", "extract"):
            row.append(f"{measure(case, workload, samples * times, threads)['peak'] / 1e6:.0f}")
        rows.append(row)
    return f"peak memory of {workload}\n\n" + markdown(("samples", "forward only, MB", "extract, MB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.case:
        child(options.case, options.workload, options.samples, options.threads)
        return
    parts = [HEAD, environment()]
    parts += [times(workload, options.samples, options.threads, options.rounds) for workload in WORKLOADS]
    write_section("Extract", "\n\n".join([*parts, memory("three light layers", 64, options.threads)]))


if __name__ == "__main__":
    main()
