"""Times cases in interleaved rounds, and writes the results as Markdown tables."""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# Results\n\nThe measurements of the scripts in this directory. Each script writes its section.\n"

_declared: list[object] = []


def declare_torchvision_operators() -> None:
    """Declares the two compiled operators that torchvision's Python code expects.

    Its wheel for CUDA contains them. With a CPU build of torch, torchvision and the packages that import it need this call.
    """
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def interleave(
    cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3, setup: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Times each case once a round, so that a drift of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + rounds):
        for name, case in cases.items():
            if setup is not None:
                setup()
            start = time.perf_counter()
            case()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                seconds[name].append(elapsed)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the median of the ratios a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def write_section(name: str, body: str, path: Path = RESULTS) -> None:
    """Prints a section, and replaces the one of the same name in the results."""
    print(body)
    text = path.read_text() if path.exists() else TITLE
    head, *sections = text.split("\n## ")
    names = [section.splitlines()[0] for section in sections]
    sections = [section.rstrip() for section in sections]
    section = f"{name}\n\n{body.strip()}"
    if name in names:
        sections[names.index(name)] = section
    else:
        sections.append(section)
    path.write_text("\n\n## ".join([head.rstrip(), *sections]) + "\n")


def environment() -> str:
    """Returns the versions, the processor and the number of threads."""
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s)"
    )
