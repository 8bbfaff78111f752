"""Finds interpreters, and makes an environment for each row with uv.

uv stores a package once for all environments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from matrix.rows import PINS, ROOT, Row

ENVIRONMENTS = Path(os.environ.get("CONVTAP_MATRIX_ENVS", ROOT / ".venv-matrix"))

#: The packages that a version of torch pins itself.
OF_TORCH = {"torch", "torchvision", "sympy"}


_ITS_VERSION = """
import sys, sysconfig
print("%d.%d" % sys.version_info[:2] + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""


class Unavailable(Exception):
    """The machine cannot make an environment, for the reason in the message."""


def interpreter(version: str) -> Path:
    """Returns the newest Python of a version (``3.14``, ``3.14t``).

    It comes from pyenv, or else from the path.

    Raises:
        Unavailable: the machine has no such Python.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    folders = [
        path for path in pyenv.glob(f"{version.rstrip('t')}.*") if path.name.endswith("t") == version.endswith("t")
    ]
    folders.sort(key=lambda path: [int(part) if part.isdigit() else 0 for part in path.name.rstrip("t").split(".")])
    on_path = shutil.which(f"python{version}")
    candidates = [folder / "bin" / f"python{version}" for folder in reversed(folders)]
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path(sys.executable)]
    for candidate in candidates:
        if candidate.exists() and _version(candidate) == version:
            return candidate
    raise Unavailable(f"python{version} is not installed on this machine")


def _version(python: Path) -> str:
    """Returns an interpreter's version, such as ``3.14t``; empty if it does not run."""
    done = subprocess.run([python, "-c", _ITS_VERSION], capture_output=True, text=True)
    return done.stdout.strip()


def prepared(row: Row) -> Path:
    """Makes or updates the environment of a row. Returns its interpreter.

    Raises:
        Unavailable: the machine has no such Python, or a package cannot be installed.
    """
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise Unavailable("uv is not installed on this machine; make matrix installs it")
    folder = ENVIRONMENTS / row.name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    settings = {"UV_CACHE_DIR": str(ENVIRONMENTS / ".uv-cache"), "UV_PYTHON_DOWNLOADS": "never"}
    environment = {**settings, **os.environ}
    if not python.exists():
        _run([uv, "venv", "--seed", "--quiet", "--python", str(interpreter(row.python)), str(folder)], environment)
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in _pins(row).items()))
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "-c", str(pins)]
    _run([*install, "-r", str(ROOT / "pyproject.toml"), "--extra", "test-core", *row.packages], environment)
    return python


def _pins(row: Row) -> dict[str, str]:
    """Returns the versions of constraints.txt that fit a row.

    constraints.txt is for Python 3.11 and its version of torch.
    """
    if row.python in ("3.10", "3.15"):
        return {}
    loose = OF_TORCH | row.pinned.keys()
    if row.pinned.keys() & {"numpy", "transformers"}:  # the pinned packages need another version of these
        return {name: PINS[name] for name in ("pytest", "hypothesis") if name not in loose}
    return {name: version for name, version in PINS.items() if name not in loose}


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line.strip(" ×├─▶╰") for line in done.stderr.splitlines() if line.strip()]
        unbuilt = [line for line in lines if "Failed to build" in line]  # the rest is the builder's output, with paths
        raise Unavailable("; ".join(unbuilt[:1] or lines[-2:]) or f"{command[1]} ended with {done.returncode}")
