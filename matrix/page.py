"""Writes docs/versions.md from the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matrix.rows import ROOT, all_rows

PAGE = ROOT / "docs" / "versions.md"
RESULTS = ROOT / "matrix" / "results"
COLUMNS = (
    "row",
    "Python",
    "torch",
    "NumPy",
    "tests",
    "passed",
    "failed",
    "skipped",
    "deselected",
    "result",
    "date",
    "commit",
)

TEXT = """# Versions

`make matrix` runs the tests on the versions of Python and torch below, each in an environment of its own, and writes this
page. A result holds for its date and its commit. If a result names a test, the run hung, was cut off or crashed in that test.

{table}

{failures}- The *core suite* is every test that needs only the extra `test-core`: `pytest --core`. *Deselected* counts the tests
  that need another package. The list `BEYOND_CORE` in `tests/conftest.py` names these tests and the package. It also names
  whole files, which the column does not count. `make test` runs all of them, with the versions of `constraints.txt`.
- The rows of Keras and transformers run only the tests that need that package. `matrix/rows.py` lists these tests.
- On a *free-threaded* Python (a version that ends in `t`), `import convtap` raises an ImportError that names `PYTHON_GIL=1`,
  because convtap counts calls without a lock of its own. The row of 3.14t runs the core suite with that variable, and tests
  the error without it. It also sets `PYTHON_THREAD_INHERIT_CONTEXT=0`, the default of other builds. It needs the first
  release candidate of safetensors 0.9, which has a wheel for 3.14t.
- The tests run on the CPU, on one thread, even with torch's build for CUDA.
- {skips}

## Not run

{not_run}

## Running it

```console
$ make matrix                                  # every row that has not passed with these sources
$ make matrix PAIRS=python3.12-torch2.10.0     # one row, of any pair of versions
$ make matrix ARGS='--again --minutes 90'      # all of them again, each for 90 minutes at most
```

The command uses the interpreters on the path and those of pyenv. It skips a row whose Python it does not find, and prints the
reason. A test that takes ten minutes counts as hung. It ends the row, and the result names it.
A row that takes 40 minutes is cut off.
The environments are in `.venv-matrix`, or in the folder of the variable `CONVTAP_MATRIX_ENVS`. Each takes up to 6 GB with a
CUDA build of torch. uv stores a package once, so all take about 40 GB together. `UV_TORCH_BACKEND=cpu` installs the builds for
the CPU instead, from PyTorch's own index. The results are in `matrix/results/*.json`.
"""

NOT_RUN = """- **Windows and macOS.** No such machine was available. `.github/workflows/ci.yml` runs the core suite on both, if
  the service is available. `tests/test_other_systems.py` fakes the known differences: the locks of Windows, which also keep
  other processes from reading; files that cannot be replaced or renamed while they are open or mapped; and `fsync`, which
  leaves the content in the drive's memory on macOS. On Windows `os.kill` would end the process without a call of the user's
  SIGTERM handler, so a test in `tests/test_extract_crash.py` forbids it.
- **The core suite on Python 3.13t**, the free-threaded build. torch has no wheel for it since 2.13, and safetensors never had
  one. On 2026-11-27, with torch 2.12.0 and without safetensors, `import convtap` raised the ImportError, and with
  `PYTHON_GIL=1` it succeeded.
- **CUDA.** These runs use only the CPU; see [limits](limits.md)."""


def results() -> dict[str, dict[str, Any]]:
    """Returns the results, by row."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return {result["name"]: result for result in found}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page, which also lists rows without a result."""
    planned = {row.name: {"name": row.name, "runs": row.runs, "outcome": "not run yet"} for row in all_rows()}
    rows = list({**planned, **found}.values())
    failed = [f"  - {test}: {_cell(why)}" for row in rows for test, why in _failures(row)]
    failures = "The failures:\n\n" + "\n".join(failed) + "\n\n" if failed else ""
    return TEXT.format(
        table=table([cells(row) for row in rows]), failures=failures, skips=_skips(rows), not_run=NOT_RUN
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def cells(result: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a row."""
    versions = result.get("versions", {})
    known = [versions.get(name, "–") for name in ("python", "torch", "numpy")]
    counts = [str(result.get(name, "–")) for name in ("passed", "failed", "skipped", "left_out")]
    when = [result.get("date", "–"), result.get("commit", "–")]
    return [result["name"], *known, result["runs"], *counts, _cell(result["outcome"]), *when]


def _failures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{result['name']}`: `{test}`", why) for test, why in result.get("failures", {}).items()]


def _skips(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describes why tests were skipped, with their numbers."""
    reasons: dict[str, int] = {}
    for row in rows:
        for why, count in row.get("skips", {}).items():
            reasons[why] = max(reasons.get(why, 0), count)
    if not reasons:
        return "No test was skipped."
    listed = "; ".join(f"{why.removeprefix('Skipped: ')} ({count})" for why, count in sorted(reasons.items()))
    return f"Tests were skipped for these reasons, with the largest number in a row: {_cell(listed)}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
