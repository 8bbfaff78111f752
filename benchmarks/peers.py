"""Measures the cost of capturing with convtap and with other libraries.

``python -m benchmarks.peers [--only stack-steady,import]`` writes the section "Peers" of ``benchmarks/RESULTS.md`` and the
chart beside it. Each library does the same work in a process of its own. In each process the plain forward and the library
take turns, so that a drift of the machine affects both, and the ratio is computed round by round. Every value is compared
with those of a reference that clones before the timing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import datasets, works
from benchmarks.harness import declare_torchvision_operators
from benchmarks.libraries import LIBRARIES
from benchmarks.prepared import PREPARED, NotOffered, compiled

HERE = Path(__file__).parent
#: The seconds for which a process measures a row, and the least number of rounds.
SECONDS, ROUNDS = 5.0, 5


def right(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> str:
    """Counts the values that equal the reference's."""
    good = 0
    for name, value in expected.items():
        got = found.get(name)
        got = got[0] if isinstance(got, (tuple, list)) and got else got
        good += isinstance(got, torch.Tensor) and got.shape == value.shape and _close(got, value)
    return f"{good} of {len(expected)}"


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return torch.allclose(a.detach(), b, atol=1e-4, rtol=1e-3)
    except RuntimeError:  # a tensor that cannot be read
        return False


def take_turns(plain: Callable[[], object], case: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Times both in turn until the time is up, after some rounds to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for one in (plain, case, plain, case):
        one()
    started = time.perf_counter()
    results: list[object] = [None, None]  # each result lives until its successor exists, as in a loop over inputs
    while time.perf_counter() - started < SECONDS or len(seconds[0]) < ROUNDS:
        for i, one in enumerate((plain, case)):
            begun = time.perf_counter()
            results[i] = one()
            seconds[i].append(time.perf_counter() - begun)
    return seconds


def fastest(one: Callable[[], object]) -> float:
    """Returns the shortest of three runs, since the first after a switch are slower."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        result = one()
        seconds.append(time.perf_counter() - begun)
    del result
    return min(seconds)


def speed(library: str, work: works.Work, *, steady: bool, stop: bool = False) -> dict[str, Any]:
    """Times forward passes with the library, set up once or for each pass."""
    prepare = PREPARED[library]

    def entered() -> dict[str, Any]:
        with prepare(work.model, work.names, stop=stop) as run:
            return run(work.x)

    values = right(entered(), work.expected)
    if not steady:
        plain, case = take_turns(work.plain, entered)
        return {"plain": plain, "case": case, "values": values}
    copy = works.copied(work)  # a library may leave hooks on the model, which would slow the plain forward too
    plain, case = [], []
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS or len(plain) < ROUNDS:
        plain.append(fastest(copy.plain))
        with prepare(work.model, work.names, stop=stop) as run:
            case.append(fastest(lambda run=run: run(work.x)))
    return {"plain": plain, "case": case, "values": values}


def compiled_speed(library: str, work: works.Work) -> dict[str, Any]:
    """Times compiled forward passes with the library, against the plain compiled one."""
    copy = works.copied(work)
    fast = torch.compile(copy.model, fullgraph=True)
    with compiled(library, work.model, work.names) as run:
        run(work.x)
        values = right(run(work.x), work.expected)
        plain, case = take_turns(lambda: fast(work.x), lambda: run(work.x))
    return {"plain": plain, "case": case, "values": values}


def memory(library: str, work: works.Work) -> dict[str, Any]:
    """Returns the peak memory above the plain forward's in MiB, with outputs kept."""
    work.plain()
    with contextlib.suppress(ImportError):
        __import__(LIBRARIES[library.partition(",")[0]][2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with PREPARED[library](work.model, work.names) as run:
        found = run(work.x)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"mib": peak, "values": right(found, work.expected)}


def data_set(library: str, work: works.Work) -> dict[str, Any]:
    """Writes a data set to disk, and measures its seconds, bytes and peak memory."""
    extract = datasets.EXTRACT.get(library)
    if extract is None:
        raise NotOffered("no way to bring a data set to disk")
    work.plain()
    data = torch.randn(datasets.SAMPLES, *work.x.shape[1:], generator=torch.Generator().manual_seed(0))
    sample = datasets.SAMPLES // 2 + 1
    expected = works.reference(work, data[sample : sample + 1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = Path(tempfile.mkdtemp())
    try:
        os.sync()
        begun = time.perf_counter()
        read = extract(work.model, work.names, data, folder)
        os.sync()
        seconds = time.perf_counter() - begun
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        values = right({name: read(name, sample) for name in work.names}, expected)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"seconds": seconds, "mb": written / 1e6, "mib": peak, "values": values}


#: The measurement of a child process, by row.
ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "stack-steady": lambda library: speed(library, works.stack(), steady=True),
    "stack-entered": lambda library: speed(library, works.stack(), steady=False),
    "wav2vec2": lambda library: speed(library, works.wav2vec2(), steady=False),
    "mamba": lambda library: speed(library, works.mamba(), steady=False),
    "stop": lambda library: speed(library, works.twenty(), steady=True, stop=True),
    "compiled": lambda library: compiled_speed(library, works.residual()),
    "memory": lambda library: memory(library, works.inplace()),
    "data-set": lambda library: data_set(library, works.five()),
}


def child(row: str, library: str) -> None:
    """Measures one row of one library, and prints a line of JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    declare_torchvision_operators()
    try:
        with torch.no_grad():
            found = ROWS[row](library)
    except NotOffered as error:
        found = {"error": f"– ({error})"}
    except Exception as error:
        lines = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {lines[0][:140] if lines else ''}"}
    print("\n" + json.dumps(found), flush=True)


def measure(row: str, library: str) -> dict[str, Any]:
    """Measures in a process of its own; one that ends without a result is a crash."""
    if row == "import":
        return import_time(library)
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent)])
    command = [sys.executable, "-m", "benchmarks.peers", "--row", row, "--library", library]
    environment = {**os.environ, "PYTHONPATH": path}
    if row == "memory":  # with this threshold glibc returns freed memory, so the peak is the memory that was alive
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    except subprocess.TimeoutExpired:
        return {"error": "no result within 15 minutes"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": f"the process ended with {done.returncode}"}


def import_time(library: str) -> dict[str, Any]:
    """Measures the seconds of ``import``, and until the capturing name is available.

    torch is imported before.
    """
    if library not in works.IMPORTS:
        return {"error": "– (nothing to import)"}
    module, _, name = works.IMPORTS[library].rpartition(".")
    code = (
        "import json, time\n"
        "from benchmarks.harness import declare_torchvision_operators\n"
        "declare_torchvision_operators()\n"
        f"begun = time.perf_counter()\nimport {LIBRARIES[library][2]}\nfirst = time.perf_counter() - begun\n"
        f"from {module} import {name}\nprint(json.dumps([first, time.perf_counter() - begun]))"
    )
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    first, whole = json.loads(done.stdout.splitlines()[-1])
    return {"import": [first], "case": [whole], "values": ""}


def main() -> None:
    """Measures the rows and writes the section."""
    from benchmarks import peers_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows, with commas between them")
    parser.add_argument("--repeats", type=int, default=2, help="processes for each library and row")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        child(options.row, options.library)
        return
    rows = options.only.split(",") if options.only else [*ROWS, "import"]
    peers_report.write(rows, options.repeats, measure)


if __name__ == "__main__":
    main()
