"""Measures the resident memory of long captures on the CPU.

    python -m benchmarks.memory [--passes 1000]

The script writes the section "Memory" of RESULTS.md. Each case runs in a process of its own: 16 convolutions on (2, 32,
2000), each followed by an in-place ReLU. It reads the resident memory after 10, 100 and all forward passes, and the peak of
the process, so that a leak shows as growth.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import markdown, write_section
from convtap import capture

CASES = {
    "plain forward": None,
    "`keep='last'`": {"keep": "last"},
    "`keep='last'`, `reduce=lambda t: t.mean(-1)`": {"keep": "last", "reduce": lambda t: t.mean(-1)},
    "`keep='last'`, `dtype=torch.float16`": {"keep": "last", "dtype": torch.float16},
    "`keep='last'`, `offload='cpu'`": {"keep": "last", "offload": "cpu"},
    "`keep='all'`, `acts.clear()` after each pass": {},
}


def resident() -> float:
    """Returns the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(name: str, passes: int) -> dict[str, float]:
    """Runs one case in this process. Returns MiB beyond those before the first pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Conv1d(32, 32, 3, padding=1), nn.ReLU(inplace=True))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 32, 2000)
    options, found, before = CASES[name], {}, resident()

    def loop(acts: object = None) -> None:
        for i in range(1, passes + 1):
            model(x)
            if options == {}:
                acts.clear()  # type: ignore[attr-defined]
            if i in (10, 100, passes):
                found[f"after {i}"] = resident() - before

    with torch.no_grad():
        if options is None:
            loop()
        else:
            with capture(model, **options) as acts:  # type: ignore[arg-type]
                loop(acts)
            found["held"] = acts.nbytes / 2**20
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return found


def main() -> None:
    """Measures every case in a process of its own, and writes the section."""
    parser = argparse.ArgumentParser(description="Measures the resident memory of long captures.")
    parser.add_argument("--passes", type=int, default=1000)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case, options.passes)))
        return
    columns = ("after 10", "after 100", f"after {options.passes}", "peak", "held")
    rows = []
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--case", name, "--passes", str(options.passes)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append((name, *(f"{found[column]:.1f}" if column in found else "" for column in columns)))
    titles = ("", *(f"{column} passes" for column in columns[:3]), "peak of the process", "outputs held at the end")
    body = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread. 16 convolutions, "
        f"{options.passes} forward passes in one capture; all outputs of one pass are 7.8 MiB. Resident memory in MiB beyond "
        f"that before the first pass.\n\n{markdown(titles, rows)}"
    )
    write_section("Memory", body)


if __name__ == "__main__":
    main()
