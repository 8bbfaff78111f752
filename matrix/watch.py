"""A pytest plugin that writes each event to a file at once.

The file of a run that hangs or crashes holds the events before that.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

_LOG = os.environ["CONVTAP_MATRIX_LOG"]


def _write(**event: Any) -> None:
    with open(_LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps({"at": time.time(), **event}) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(event="began", test=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(event=report.outcome, test=report.nodeid, why=_why(report))


def pytest_runtest_logfinish(nodeid: str) -> None:
    _write(event="ended", test=nodeid)


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        _write(event=report.outcome, test=report.nodeid, why=_why(report))


def pytest_deselected(items: list[Any]) -> None:
    for item in items:
        _write(event="left out", test=item.nodeid)


def pytest_sessionfinish(exitstatus: int) -> None:
    _write(event="finished", status=int(exitstatus))


def _why(report: Any) -> str:
    """Returns the last line of a failure, or the reason of a skip."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr or "")
    return message.strip().splitlines()[0][:300] if message.strip() else ""
