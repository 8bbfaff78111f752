"""Checks the outputs that each library captures against references.

``python -m benchmarks.correctness`` writes ``benchmarks/CORRECTNESS.md``. Each library runs in a process of its own.
Libraries that are not installed are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.cases import CASES, NoHint, NotApplicable, Wrong
from benchmarks.harness import declare_torchvision_operators, markdown
from benchmarks.libraries import LIBRARIES

HERE = Path(__file__).parent


def run(library: str) -> None:
    """Runs all cases with one library, and prints a line of JSON for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    declare_torchvision_operators()
    collect = LIBRARIES[library][0]
    for case in CASES:
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            case(collect)
            verdict, text = "pass", ""
        except Wrong as error:
            verdict, text = "wrong", str(error)
        except NoHint as error:
            verdict, text = "no hint", f"{type(error.__cause__).__name__}: {str(error.__cause__)[:160]}"
        except NotApplicable as error:
            verdict, text = "–", str(error)
        except Exception as error:
            lines = str(error).strip().splitlines()
            verdict, text = "error", f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
        print("\n" + json.dumps([case.__name__, verdict, text]), flush=True)


def results(library: str) -> dict[str, tuple[str, str]]:
    """Runs a library in a process of its own; a case that ends it is a crash."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent)])
    command = [sys.executable, "-m", "benchmarks.correctness", library]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    found = {name: (verdict, text) for name, verdict, text in lines}
    crash = ("error", f"the process ended with {done.returncode}")
    return {case.__name__: found.get(case.__name__, crash) for case in CASES}


def main() -> None:
    """Writes the table."""
    libraries = [name for name, (_, _, module) in LIBRARIES.items() if importlib.util.find_spec(module)]
    by_library = {name: results(name) for name in libraries}
    rows = []
    for case in CASES:
        verdicts = [by_library[name][case.__name__][0] for name in libraries]
        rows.append((case.__doc__, *(f"**{v}**" if v == "wrong" else v for v in verdicts)))
    counts = [sum(v == "pass" for v, _ in by_library[name].values()) for name in libraries]
    rows.append((f"passed, of {len(CASES)}", *counts))
    details = [
        f"- {name}, {case.__doc__}: {verdict}: {text}"
        for name in libraries
        for case in CASES
        for verdict, text in [by_library[name][case.__name__]]
        if verdict != "pass"
    ]
    Path(HERE / "CORRECTNESS.md").write_text(
        "\n".join(
            [
                "# Correctness of the captured outputs",
                "",
                "Written by `python -m benchmarks.correctness`. Every value is compared with a reference computed by hand "
                "(`benchmarks/cases.py`). Each library is used as its documentation shows (`benchmarks/libraries.py`). "
                "*pass*: the reference's values and number of calls. **wrong**: another result without an error. *error*: an "
                "exception. *no hint*: the expected exception without the helpful name. –: the library does not offer this.",
                "",
                f"{versions(libraries)}; Python {platform.python_version()}, {platform.machine()}, CPU.",
                "",
                markdown(["case", *libraries], rows),
                "",
                "## Failures",
                "",
                *details,
                "",
            ]
        )
    )


def versions(libraries: list[str]) -> str:
    """Returns the versions of the libraries."""
    from convtap import __version__

    found = [f"convtap {__version__}", f"torch {torch.__version__}"]
    for name in libraries:
        distribution = LIBRARIES[name][1]
        if distribution not in ("convtap", "torch"):
            found.append(f"{distribution} {importlib.metadata.version(distribution)}")
    return ", ".join(found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        main()
