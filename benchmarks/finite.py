"""Measures the cost of ``finite`` on wav2vec2-base and one second of audio.

The forward runs plain and inside ``finite``, interleaved in one process. ``python -m benchmarks.finite`` writes the section
"finite" of RESULTS.md. The bar is 1.2 times the plain forward, with every module watched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness import environment, interleave, markdown, paired_ratio, quartiles, write_section
from benchmarks.overhead import wav2vec2_base
from convtap import finite


def inside(model: nn.Module, run: Callable[[], object], **options: object) -> Callable[[], object]:
    """Returns a forward pass inside ``finite``."""

    def case() -> object:
        with finite(model, **options):  # type: ignore[arg-type]
            return run()

    return case


def main() -> None:
    """Measures all cases and writes the section."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, run = wav2vec2_base()
    cases = {
        "plain forward": run,
        "finite": inside(model, run),
        "finite, types=nn.Conv1d": inside(model, run, types=nn.Conv1d),
    }
    with torch.no_grad():
        seconds = interleave(cases, rounds=20)
    plain = seconds["plain forward"]
    rows = []
    for name, values in seconds.items():
        low, middle, high = (value * 1e3 for value in quartiles(values))
        rows.append((name, f"{middle:.1f} ms", f"{low:.1f} – {high:.1f}", f"{paired_ratio(values, plain):.3f}"))
    head = f"`python -m benchmarks.finite`. {environment()}; wav2vec2-base, one second of audio."
    write_section("finite", f"{head}\n\n" + markdown(("", "median", "quartiles", "÷ plain"), rows))


if __name__ == "__main__":
    main()
