"""Checks each model of the gallery in its environment, and writes docs/gallery.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import markdown
from gallery.check import ROUNDS, TOLERANCE

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
MODELS = sorted(path.stem for path in (ROOT / "gallery" / "models").glob("[!_]*.py"))
COLUMNS = (
    "package",
    "model and input",
    "layers",
    "seen as",
    "convolutions",
    "captured",
    "largest difference",
    "plain",
    "capture ÷ plain",
)
TEXT = f"""# Gallery

This page checks convtap on published models with their trained weights. `make gallery` installs each package in an environment
of its own, runs the check, and writes this page. The models are in `gallery/models/`, and `make test` does not run them. A
package qualifies if it contains its weights, so that nothing is downloaded at run time.

{{table}}

- *Convolutions* counts the 1-D convolutions of a plain run, without a capture. torch's dispatcher counts them, so the
  number includes those of modules, of functions, of TorchScript and of Keras.
- *Captured* counts the convolutions that `capture(model)` returned, in order, with the right value. The right value is computed
  in float64 from the convolution's input and weight, as products of windows and kernels. This uses neither convtap nor a
  convolution. A value is right if it differs by at most {TOLERANCE:g} of the layer's largest value. Rounding to float32
  explains such a difference.
- *Seen as* is `Call.via`: how convtap saw the calls.
- *Plain* is the time of a forward pass without a capture.
- *Capture ÷ plain* is the median of {ROUNDS} interleaved rounds, each with a capture of its own, on one thread of a shared
  machine. The convolutions of Silero VAD are tiny, so the fixed cost of a captured call shows.
- A Keras layer returns its output after the bias and the activation. PESTO's last layer is a subclass of `Conv1d` that drops
  the channel. The reference values include these steps.

Measured with {{versions}}.
"""


def row(name: str) -> dict[str, Any]:
    """Returns the row of one model, or the error that prevented it."""
    package = {"package": name.replace("_", "-")}
    environment = ROOT / f".venv-gallery-{name}"
    if not (environment / ".ready").exists():
        return package | {"error": f"the installation failed: {last_line(environment / 'install.log')}"}
    done = subprocess.run(
        [environment / "bin" / "python", "-m", "gallery.check", name],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return package | {"error": (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])  # packages may print lines before it
    return found


def last_line(log: Path) -> str:
    """Returns the last line of a log, or a text if the log is empty."""
    lines = log.read_text().splitlines() if log.exists() else []
    return lines[-1] if lines else "no log"


def cells(found: dict[str, Any]) -> list[str]:
    """Returns the cells of one row of the table."""
    package = " ".join(filter(None, (found["package"], found.get("version"))))
    if "error" in found:
        return [package, found["error"].replace("|", "\\|"), *["–"] * (len(COLUMNS) - 2)]
    largest = found["difference"]
    return [
        package,
        found["title"],
        str(found["layers"]),
        ", ".join(found["via"]),
        str(found["convolutions"]),
        str(found["captured"]) + (f" ({found['reason']})" if found.get("reason") else ""),
        "–" if largest is None else f"{largest:.1e}",
        f"{found['milliseconds']:.1f} ms",
        f"{found['ratio']:.2f}",
    ]


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the page."""
    torches = sorted({found["torch"] for found in rows if "torch" in found})
    versions = f"torch {', '.join(torches)}, Python {platform.python_version()}, {platform.machine()}"
    return TEXT.format(table=markdown(COLUMNS, [cells(found) for found in rows]), versions=versions)


def main() -> int:
    """Writes the page. Returns 1 if a model failed or a convolution is missing."""
    rows = []
    for name in MODELS:
        rows.append(row(name))
        print(json.dumps(rows[-1]), flush=True)
    PAGE.write_text(page(rows))
    return int(any("error" in found or found.get("reason") for found in rows))


if __name__ == "__main__":
    sys.exit(main())
