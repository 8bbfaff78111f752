"""Runs the tests of a row within a time limit, and finds how they ended.

A row passes, fails, hangs, crashes, or is cut off by the time limit.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matrix.rows import ROOT, Row

#: A test that takes longer counts as hung. The slowest takes half a minute on an idle machine.
TEST_SECONDS = 600

_VERSIONS = """
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in ("torch", "numpy", "pytest", "keras", "transformers"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
import torch
found["torch"] = torch.__version__
print(json.dumps(found))
"""


def measured(row: Row, python: Path, minutes: float, log: Path) -> dict[str, Any]:
    """Runs a row's tests. Returns the result with versions, date and commit."""
    log.unlink(missing_ok=True)
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "CONVTAP_MATRIX_LOG": str(log),
        "PYTHONUNBUFFERED": "1",
        **dict(row.environment),
    }
    command = [str(python), "-m", "pytest", "-p", "matrix.watch", "-p", "no:cacheprovider", "-rf"]
    command += ["-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true", *row.tests]
    start, here = time.monotonic(), stamp()  # before the run, since the sources may change meanwhile
    with open(log.with_suffix(".txt"), "w", encoding="utf-8") as output:
        ended = run_within(command, minutes * 60, output, environment)
    result = {"name": row.name, "runs": row.runs, "versions": _versions(python), "system": system()}
    return {
        **result,
        **outcome(events(log), ended, time.time()),
        "minutes": round((time.monotonic() - start) / 60, 1),
        **here,
    }


def run_within(command: list[str], seconds: float, output: Any, environment: dict[str, str]) -> bool:
    """Runs a command, and ends it and its children after the time limit.

    Returns:
        Whether the command ended by itself.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=os.name != "nt"
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if os.name != "nt":
            with contextlib.suppress(ProcessLookupError):  # also processes that the tests left behind
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    return True


def events(log: Path) -> list[dict[str, Any]]:
    """Returns the events that ``matrix.watch`` wrote."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def outcome(found: Iterable[dict[str, Any]], ended: bool, now: float) -> dict[str, Any]:
    """Counts the tests, and names those that failed, hung or ended the process.

    Args:
        ended: whether the process ended by itself, or pytest ended it after a test of more than ``TEST_SECONDS``.
        now: the time at which it ended.
    """
    tests: dict[str, str] = {}
    failures: dict[str, str] = {}
    skips: dict[str, int] = {}
    running, since, finished, left_out = "", now, False, 0
    for event in found:
        kind, name = event["event"], event.get("test", "")
        if kind == "began":
            running, since = name, event["at"]
        elif kind == "ended":
            running = ""
        elif kind == "left out":
            left_out += 1
        elif kind == "finished":
            finished = True
        elif tests.get(name) != "failed":
            tests[name] = kind
            if kind == "failed":
                failures[name] = event["why"]
            elif kind == "skipped":
                skips[event["why"]] = skips.get(event["why"], 0) + 1
    counts = {kind: list(tests.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    end = "failed" if failures else "passed" if counts["passed"] else "no test ran"
    if not finished:
        how = "hung" if now - since >= TEST_SECONDS else "crashed" if ended else "cut off by the time limit"
        end = f"{how} in {running or 'no test'}"
    return {"outcome": end, **counts, "left_out": left_out, "failures": failures, "skips": skips}


def system() -> str:
    """Returns the operating system and the processor."""
    return f"{platform.system()} {platform.machine()}"


def stamp() -> dict[str, str]:
    """Returns the date, the commit and the checksum of the sources."""
    changed = _git("status", "--porcelain", "--", "src", "tests", "examples", "pyproject.toml")
    commit = _git("rev-parse", "--short=9", "HEAD") + (" with changes" if changed else "")
    return {"date": datetime.date.today().isoformat(), "commit": commit, "sources": sources()}


def sources() -> str:
    """Returns a checksum of the package, the tests and the examples."""
    digest = hashlib.sha256()
    paths = [path for folder in ("src", "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted([*paths, ROOT / "pyproject.toml"]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _versions(python: Path) -> dict[str, str]:
    done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return found
