"""Checks dist/: what the sdist and the wheel hold, and the wheel in an empty environment: ``python -m tests.dist``."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"

IMPORTS = """
import importlib.metadata, pathlib, sys
import convtap
assert convtap.__version__ == importlib.metadata.version("convtap")
assert pathlib.Path(convtap.__file__).is_relative_to(sys.prefix), convtap.__file__
print(convtap.__version__)
"""

PLOTS = """
import torch
from convtap import capture
model, x = torch.nn.Conv1d(1, 2, 3), torch.randn(1, 1, 50)
with capture(model) as acts:
    model(x)
{action}
"""


def tracked() -> set[str]:
    """Returns the files of the repository."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def check_wheel(path: Path) -> None:
    """Compares the wheel with the sources of the package, and reads its metadata."""
    files = tracked()
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        folder = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    wanted = {name.removeprefix("src/") for name in files if name.startswith("src/")}
    expect(
        "the wheel",
        names,
        wanted
        | {f"{folder}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
        | {f"{folder}/licenses/LICENSE"},
    )
    missing = [
        name for name in ("Name", "Version", "Author", "License-Expression", "Requires-Python") if not metadata[name]
    ]
    if missing or "convtap/py.typed" not in names:
        raise SystemExit(f"the metadata lack {missing}")


def check_sdist(path: Path) -> None:
    """Compares the sdist with the repository: the tests, the docs and what they need are in it."""
    with tarfile.open(path) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    expect("the sdist", names, {name for name in tracked() if not name.startswith((".ci/", ".github/"))} | {"PKG-INFO"})


def expect(what: str, names: set[str], wanted: set[str]) -> None:
    """Raises SystemExit if a distribution lacks a file, or has one that is not of the repository."""
    missing, more = sorted(wanted - names), sorted(names - wanted)
    if missing or more:
        raise SystemExit(f"{what} lacks {missing} and has {more} beside what git tracks")
    print(f"{what} has its {len(names)} files")


def check_installed(wheel: Path, torch: list[str]) -> None:
    """Installs the wheel into an empty environment, and runs it outside of the repository.

    Args:
        torch: what pip installs first: the torch to use, and options.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        run([sys.executable, "-m", "venv", environment], folder)
        scripts = environment / ("Scripts" if os.name == "nt" else "bin")
        python, convtap = scripts / "python", scripts / "convtap"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if torch:
            run([*pip, *torch], folder)
        run([*pip, wheel], folder)
        run([python, "-m", "pip", "check"], folder)
        run([python, "-W", "error", "-c", IMPORTS], folder)
        run([convtap, "--help"], folder)
        run([convtap, "demo", "--out", "plain"], folder)
        run(
            [
                python,
                "-c",
                PLOTS.format(action="try:\n    acts.plot()\nexcept ImportError as error:\n    print(error)"),
            ],
            folder,
            says="convtap[plot]",
        )
        for example in ("dead_channels.py", "activation_penalty.py"):
            run([python, ROOT / "examples" / example], folder)
        run([*pip, f"{wheel}[plot]"], folder)
        run([python, "-c", PLOTS.format(action='acts.plot().savefig("maps.png")')], folder)
        run([convtap, "demo", "--out", "drawn"], folder)
        for file in ("maps.png", "plain/five_layers.safetensors", "plain/five_layers.html", "drawn/five_layers.png"):
            if not (Path(folder) / file).stat().st_size:
                raise SystemExit(f"{file} is empty")
    print("the installed wheel imports, runs the demo and two examples, and plots with its extra")


def run(command: list[object], folder: str, says: str = "") -> None:
    """Runs a command outside of the repository. Raises SystemExit with its output if it fails or does not say so."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode or says not in done.stdout:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def main(torch: list[str]) -> None:
    """Checks both distributions. The arguments are passed to pip before the wheel, such as ``torch==2.13.0``."""
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    check_installed(wheel, torch)


if __name__ == "__main__":
    main(sys.argv[1:])
