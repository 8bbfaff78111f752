"""The rows of the matrix: pairs of Python and torch, and rows for other packages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
TORCH = PINS["torch"]

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.6.0", "2.8.0", "2.11.0", "2.14.1", "2.15.0")

#: The oldest safetensors with a wheel for free-threaded Python. There is none for 3.13t.
SAFETENSORS = "safetensors==0.9.0rc1"

#: With the global lock, and with threads that do not inherit a context, as in other builds.
FREE_THREADED = (("PYTHON_GIL", "1"), ("PYTHON_THREAD_INHERIT_CONTEXT", "0"))

KERAS = ("tests/test_keras.py", "tests/test_three_ways.py")
TRANSFORMERS = (
    "tests/test_real_models.py",
    "tests/test_real_functional_models.py",
    "tests/test_timeline_models.py",
    "tests/test_activation.py::test_a_real_model_against_its_own_layers",
    "tests/test_extract_lengths.py::test_a_wav2vec2_encoder_gives_the_frames_that_transformers_says",
)

_PAIR = re.compile(r"python(3\.\d+t?)-torch(\d+\.\d+\.\d+)")


@dataclass(frozen=True)
class Row:
    """An environment and the tests that run in it.

    Attributes:
        name: the name of the environment and of the file of the result.
        python: the version, such as ``3.14``, or ``3.14t`` for the free-threaded build.
        packages: the packages to install beside the dependencies and the extra ``test-core``.
        tests: the arguments of pytest.
        runs: a description of the tests.
        environment: the variables of the environment to set for pytest.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    tests: tuple[str, ...] = ("--core",)
    runs: str = "core suite"
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def pinned(self) -> dict[str, str]:
        """The packages that the row itself pins."""
        return dict(package.split("==") for package in self.packages if "==" in package)


def pair(python: str, torch: str) -> Row:
    """Returns the row of a Python and a torch."""
    name = f"python{python}-torch{torch}"
    if python.endswith("t"):
        packages = (f"torch=={torch}", SAFETENSORS)
        return Row(name, python, packages, runs="core suite with PYTHON_GIL=1", environment=FREE_THREADED)
    return Row(name, python, (f"torch=={torch}",))


def single(package: str, version: str, tests: Sequence[str], runs: str, *packages: str) -> Row:
    """Returns the row of another package, with the Python and torch of ``make test``."""
    return Row(
        f"{package}{version}", "3.11", (f"torch=={TORCH}", f"{package}=={version}", *packages), tuple(tests), runs
    )


def all_rows() -> list[Row]:
    """Returns the rows in the order of the page."""
    return [
        *(pair(python, TORCH) for python in PYTHONS),
        *(pair("3.11", torch) for torch in TORCHES),
        pair("3.15", "2.15.0"),  # the first torch with wheels for 3.15
        pair("3.13t", "2.12.0"),  # the last torch with wheels for 3.13t
        pair("3.14t", TORCH),
        single("numpy", "1.26.4", ("--core",), "core suite"),
        single("keras", "3.8.0", KERAS, "tests of Keras models"),
        single("keras", PINS["keras"], KERAS, "tests of Keras models"),
        single("transformers", "4.57.6", TRANSFORMERS, "tests of models of transformers"),
        single("transformers", PINS["transformers"], TRANSFORMERS, "tests of models of transformers"),
    ]


def chosen(names: Sequence[str]) -> list[Row]:
    """Returns the rows with these names.

    A name may also be a pair that is not on the page, such as ``python3.12-torch2.10.0``.

    Raises:
        SystemExit: a name is neither a row nor a pair.
    """
    known = {row.name: row for row in all_rows()}
    rows = []
    for name in names or known:
        match = _PAIR.fullmatch(name)
        if name not in known and match is None:
            raise SystemExit(f"{name!r} is not a row. Pass one of {', '.join(known)}, or any pythonX.Y-torchX.Y.Z.")
        rows.append(known.get(name) or pair(*match.groups()))  # type: ignore[union-attr]
    return rows
