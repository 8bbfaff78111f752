"""Writes down what libraries cost beside each other: a section of tables, and a chart of the same figures."""

from __future__ import annotations

import importlib.util
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import datasets, works
from benchmarks.correctness import versions
from benchmarks.harness import RESULTS, markdown, quartiles, write_section
from benchmarks.libraries import LIBRARIES
from benchmarks.prepared import PREPARED

Result = dict[str, Any]
CHART = RESULTS.with_name("peers.png")

#: By row: what is done, and the title in the chart. In the order of the section.
TITLES = {
    "stack-steady": (
        "64 × Conv1d(8, 8, 3) on (1, 8, 64), all captured; set up once",
        "64 tiny layers, set up once",
    ),
    "stack-entered": (
        "The same, set up and taken down for each forward pass",
        "64 tiny layers, set up for each forward",
    ),
    "wav2vec2": (
        "wav2vec2-base, one second of audio, its seven convolutions; set up for each forward pass",
        "wav2vec2-base, 1 s",
    ),
    "mamba": (
        "A Mamba of 8 layers, 64 tokens: its convolutions are called as functions; set up for each forward pass",
        "Mamba, 8 layers",
    ),
    "stop": (
        "20 × Conv1d(64, 64, 3) on (4, 64, 2000), ended after the third (3/20 = 0.15 at best)",
        "ended after layer 3 of 20",
    ),
    "compiled": (
        "16 residual blocks with Conv1d(64, 64, 3) on (4, 64, 2000), compiled by inductor; against "
        "the plain compiled forward",
        "compiled, 16 residual blocks",
    ),
    "data-set": (
        "1,000 samples through five Conv1d, 1.28 GB of outputs, until they are on the disk",
        "1,000 samples to disk, s",
    ),
    "memory": (
        "32 × Conv1d(64, 64, 3) with a ReLU in place on (1, 64, 20000), 156 MiB of outputs: peak memory "
        "above the plain forward, freed blocks given back at once",
        "peak memory, MiB",
    ),
    "import": ("Import, after torch", "import, ms"),
}


def write(rows: Sequence[str], repeats: int, measure: Callable[[str, str], Result]) -> None:
    """Measures the rows, library after library in each of the repeats, and writes the section and the chart."""
    libraries = [name for name in PREPARED if importlib.util.find_spec(LIBRARIES[name.partition(",")[0]][2])]
    found: dict[str, dict[str, Result]] = {}
    for row in rows:
        runs: dict[str, list[Result]] = {name: [] for name in lines_of(row, libraries)}
        for _ in range(repeats):
            for name in runs:
                runs[name].append(measure(row, name))
                print(row, name, runs[name][-1].get("error", ""), flush=True)
        found[row] = {name: joined(results) for name, results in runs.items()}
    head = (
        f"`make bench`. {versions([name for name in libraries if name in LIBRARIES])}; Python {platform.python_version()}, "
        f"{platform.machine()}, one thread. Each library in {repeats} processes of its own a row, in turn with the plain "
        "forward; medians, and in brackets the middle half. *values*: how many of the captured values are those of a "
        "reference that clones. Each library is used on the fastest way that it documents (`benchmarks/prepared.py`, "
        "`benchmarks/datasets.py`). What cannot do a row says why."
    )
    parts = [head, f"![The same figures as bars]({CHART.name})"]
    for row in rows:
        parts += [f"### {TITLES[row][0]}", table(row, found[row])]
    write_section("Peers", "\n\n".join(parts))
    draw(found)


def lines_of(row: str, libraries: Sequence[str]) -> list[str]:
    """The libraries in a row's table, some of them with several settings."""
    whole = [name for name in libraries if name in LIBRARIES]
    if row in works.WITHOUT_FUNCTIONS:
        return list(libraries)
    if row == "data-set":
        settings = [name for name in datasets.EXTRACT if name not in whole]
        return [*whole[:1], *settings, *whole[1:]]
    return whole


def joined(results: list[Result]) -> Result:
    """Puts together what several processes measured. An error in one is the library's result."""
    for result in results:
        if "error" in result:
            return result
    whole: Result = {"values": results[0]["values"]}
    for key, value in results[0].items():
        if isinstance(value, list):
            whole[key] = [number for result in results for number in result[key]]
        elif key != "values":
            whole[key] = [result[key] for result in results]
    if any(result["values"] != whole["values"] for result in results):
        whole["values"] = ", ".join(sorted({result["values"] for result in results}))
    return whole


def ratios(result: Result) -> list[float]:
    """The times of a library as multiples of the plain forward beside it."""
    return [case / plain for case, plain in zip(result["case"], result["plain"], strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the middle half in brackets."""
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}"
    low, middle, high = quartiles(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})"


def table(row: str, found: dict[str, Result]) -> str:
    """One row of the comparison as a table, a line for each library."""
    columns = {
        "data-set": ("s", "MB on the disk", "peak MiB above plain", "values"),
        "memory": ("MiB",),
        "import": ("`import`, ms", "with the name that captures, ms"),
    }.get(row, ("ms", "÷ plain", "values"))
    lines = []
    for name, result in found.items():
        if "error" in result:
            lines.append((name, result["error"].replace("|", "\\|"), *[""] * (len(columns) - 1)))
        elif row == "data-set":
            cells = (
                spread(result["seconds"], 1),
                f"{result['mb'][0]:,.0f}",
                spread(result["mib"], 0),
                result["values"],
            )
            lines.append((name, *cells))
        elif row == "memory":
            lines.append((name, spread(result["mib"], 0)))
        elif row == "import":
            lines.append((name, *(spread([1e3 * s for s in result[key]], 1) for key in ("import", "case"))))
        else:
            ms = spread([1e3 * s for s in result["case"]], 2)
            lines.append((name, ms, spread(ratios(result), 2), result["values"]))
    return markdown(("", *columns), lines)


def figure_of(row: str, result: Result) -> float:
    """The one number of a library on a row."""
    key = {"data-set": "seconds", "memory": "mib"}.get(row)
    values = result[key] if key else [1e3 * s for s in result["case"]] if row == "import" else ratios(result)
    return statistics.median(values)


def draw(found: dict[str, dict[str, Result]]) -> None:
    """Draws a panel of bars for each row; a bar whose values were not all right is hatched."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        -(-len(found) // 3), min(3, len(found)), figsize=(15, 10), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (row, results) in zip(axes.flat, found.items(), strict=False):
        names = list(results)
        for place, name in enumerate(names):
            result = results[name]
            if "error" in result:
                axis.text(
                    0.02, place, "cannot", va="center", fontsize=8, color="0.45", transform=axis.get_yaxis_transform()
                )
                continue
            value = figure_of(row, result)
            got, _, wanted = result["values"].partition(" of ")
            color = "tab:blue" if name.startswith("convtap") else "0.7"
            axis.barh(place, value, color=color, hatch=None if got == wanted else "////", edgecolor="white")
            shown = f" {value:,.2f}" if value < 10 else f" {value:,.0f}"
            axis.text(value, place, shown, va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 3)
        title = TITLES[row][1]
        axis.set_title(title if row in ("data-set", "memory", "import") else f"{title}, ÷ plain", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Less is better; logarithmic axes. Hatched: values that are wrong or missing.", fontsize=10)
    figure.savefig(CHART, dpi=110)
