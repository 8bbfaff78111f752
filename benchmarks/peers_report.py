"""Writes the comparison of libraries: a section of tables and a chart."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import datasets, works
from benchmarks.correctness import versions
from benchmarks.harness import RESULTS, markdown, quartiles, write_section
from benchmarks.libraries import LIBRARIES
from benchmarks.prepared import PREPARED

Result = dict[str, Any]
CHART = RESULTS.with_name("peers.png")

#: By row: the description, and the title in the chart, in the order of the section.
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
    """Measures the rows for each library and repeat, and writes section and chart."""
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
        f"{platform.machine()}, one thread. Each library runs in {repeats} processes of its own a row, in turn with the plain "
        "forward. The figures are medians, with the middle half in brackets; without set-up, each is the shortest of three "
        "runs. *values*: how many of the captured values equal those of a reference that clones. Each library is used in the "
        "fastest way that it documents (`benchmarks/prepared.py`, `benchmarks/datasets.py`). A library that does not offer a "
        "row has the reason instead."
    )
    tables = written() | {TITLES[row][0]: table(row, results) for row, results in found.items()}
    parts = [head, f"![The same figures as bars]({CHART.name})"]
    for title, _ in TITLES.values():
        if title in tables:
            parts += [f"### {title}", tables[title]]
    write_section("Peers", "\n\n".join(parts))
    draw()


def written() -> dict[str, str]:
    """Returns the present tables of the section, by title."""
    section = RESULTS.read_text().partition("\n## Peers\n")[2].partition("\n## ")[0]
    pairs = [part.partition("\n") for part in section.split("\n### ")[1:]]
    return {title: text.strip() for title, _, text in pairs}


def lines_of(row: str, libraries: Sequence[str]) -> list[str]:
    """Returns the libraries in a row's table, some with several settings."""
    whole = [name for name in libraries if name in LIBRARIES]
    if row in works.WITHOUT_FUNCTIONS:
        return list(libraries)
    if row == "data-set":
        settings = [name for name in datasets.EXTRACT if name not in whole]
        return [*whole[:1], *settings, *whole[1:]]
    return whole


def joined(results: list[Result]) -> Result:
    """Joins the results of several processes; an error in one is the library's result."""
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
    """Returns the times of a library as multiples of the plain forward's beside it."""
    return [case / plain for case, plain in zip(result["case"], result["plain"], strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the median, with the middle half in brackets."""
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}"
    low, middle, high = quartiles(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})"


def table(row: str, found: dict[str, Result]) -> str:
    """Returns one row of the comparison as a table, with a line for each library."""
    columns = {
        "data-set": ("s", "MB on the disk", "peak MiB above plain", "values"),
        "memory": ("MiB", "values"),
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
            lines.append((name, spread(result["mib"], 0), result["values"]))
        elif row == "import":
            lines.append((name, *(spread([1e3 * s for s in result[key]], 1) for key in ("import", "case"))))
        else:
            ms = spread([1e3 * s for s in result["case"]], 2)
            lines.append((name, ms, spread(ratios(result), 2), result["values"]))
    return markdown(("", *columns), lines)


def draw() -> None:
    """Draws a panel of bars for each table, hatched if some values are wrong."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tables = written()
    rows = [row for row, (title, _) in TITLES.items() if title in tables]
    figure, axes = pyplot.subplots(-(-len(rows) // 3), 3, figsize=(15, 10), squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        panel(axis, row, bars(row, tables[TITLES[row][0]]))
    figure.suptitle(
        "Less is better. Hatched: values that are wrong or missing. A bar with an arrow is cut: its length is the number.",
        fontsize=10,
    )
    figure.savefig(CHART, dpi=110)


def bars(row: str, text: str) -> dict[str, tuple[float, bool] | None]:
    """Returns the figure of each library in a table, and whether its values are right.

    The entry is None if the library fails. A library that does not offer the row is skipped.
    """
    head, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]
    column = {"data-set": 1, "memory": 1}.get(row, 2)
    found: dict[str, tuple[float, bool] | None] = {}
    for cells in lines:
        if cells[1].startswith("–"):
            continue
        number = cells[column].partition(" ")[0].replace(",", "")
        got, _, wanted = cells[-1].partition(" of ") if head[-1] == "values" else ("", "", "")
        found[cells[0]] = (float(number), got == wanted) if number.replace(".", "").isdigit() else None
    return found


def panel(axis: Any, row: str, results: dict[str, tuple[float, bool] | None]) -> None:
    """Draws one row on a linear axis from 0, and cuts a bar that is far too long."""
    figures = sorted(result[0] for result in results.values() if result is not None)
    limit = 1.3 * max(value for value in figures if value <= 5 * figures[len(figures) // 2])
    axis.set_xlim(0, limit)
    for place, (name, result) in enumerate(results.items()):
        if result is None:
            axis.text(0.01, place, "fails", va="center", fontsize=8, color="0.5", transform=axis.get_yaxis_transform())
            continue
        value, right = result
        color = "tab:blue" if name.startswith("convtap") else "0.7"
        axis.barh(place, min(value, limit), color=color, hatch=None if right else "////", edgecolor="white")
        shown = f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
        shown = shown if right else f"{shown}, wrong"
        if value > limit:
            axis.text(0.99 * limit, place, f"{shown} →", va="center", ha="right", fontsize=8)
        else:
            axis.text(value, place, f" {shown}", va="center", fontsize=8)
    axis.set_yticks(range(len(results)), list(results), fontsize=8)
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
    title = TITLES[row][1]
    has_unit = row in ("data-set", "memory", "import")
    axis.set_title(title if has_unit else f"{title}, ÷ plain forward", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
