"""Measures running statistics against the mean of each channel, on wav2vec2-base.

The cases are interleaved in one process. ``python -m benchmarks.running_statistics`` writes the section "Statistics" of
RESULTS.md. Each context covers eight passes, so an allocation at its beginning counts an eighth.
"""

from __future__ import annotations

import statistics as numbers
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.harness import environment, markdown, paired_ratio, quartiles, write_section
from benchmarks.overhead import wav2vec2_base
from convtap import capture, statistics

PASSES, ROUNDS = 8, 8


def main() -> None:
    torch.set_num_threads(1)
    model, run = wav2vec2_base()
    contexts: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "plain forward": nullcontext,
        "capture(reduce=lambda t: t.mean((0, 2)))": lambda: capture(model, reduce=lambda t: t.mean((0, 2))),
        "statistics": lambda: statistics(model),
        "statistics, quantiles=None": lambda: statistics(model, quantiles=None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for i in range(ROUNDS + 1):
        for name, context in contexts.items():
            start = time.process_time()  # processor time of this process, since the machine has other work
            with torch.no_grad(), context():
                for _ in range(PASSES):
                    run()
            if i:
                seconds[name].append((time.process_time() - start) / PASSES)
    plain, mean = (seconds[name] for name in list(contexts)[:2])
    rows = []
    for name, values in seconds.items():
        low, middle, high = (1e3 * value for value in quartiles(values))
        ratios = (f"{paired_ratio(values, plain):.3f}", f"{paired_ratio(values, mean):.3f}")
        rows.append((name, f"{middle:.1f} ms", f"{low:.1f} – {high:.1f}", *ratios))
    with statistics(model) as stats, torch.no_grad():
        run()
    table = markdown(("", "median", "quartiles", "÷ plain", "÷ mean of each channel"), rows)
    about = (
        f"wav2vec2-base with random weights, one second of audio, {PASSES} passes a context, {ROUNDS} rounds, processor time. "
        f"{environment()}. The statistics of {len(stats)} layers with {sum(s.channels or 0 for s in stats.values()):,} "
        f"channels take {stats.nbytes / 2**20:.1f} MiB. The bar is 1.3 times the mean of each channel."
    )
    worst = numbers.median(seconds["statistics"]) / numbers.median(mean)
    write_section("Statistics", f"{about}\n\n{table}\n\nMedians: {worst:.2f} times the mean of each channel.")


if __name__ == "__main__":
    main()
