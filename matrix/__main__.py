"""Runs rows of the matrix, then writes docs/versions.md: ``python -m matrix [ROW]``.

A row is skipped if it has passed with the same sources.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from matrix.environment import ENVIRONMENTS, Unavailable, prepared
from matrix.page import PAGE, RESULTS, page, results
from matrix.rows import Row, chosen
from matrix.suite import measured, sources, stamp, system


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a row failed, or if a row that was named cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m matrix", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="a row such as python3.14-torch2.13.0 (default: all rows of the page)"
    )
    parser.add_argument("--again", action="store_true", help="also run rows that have passed with the same sources")
    parser.add_argument("--install", action="store_true", help="only make the environments")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--minutes", type=float, default=40, help="the time limit of a row (%(default)s)")
    args = parser.parse_args(argv)
    well = True
    ENVIRONMENTS.mkdir(exist_ok=True, parents=True)
    for row in [] if args.page else chosen(args.rows):
        before = results().get(row.name, {})
        if before.get("sources") == sources() and before["outcome"] == "passed" and not (args.again or args.install):
            print(f"{row.name}: passed on {before['date']} with the same sources", flush=True)
            continue
        well &= _run(row, args.minutes, args.install, before, is_asked_for=bool(args.rows))
        PAGE.write_text(page(results()), encoding="utf-8")
    PAGE.write_text(page(results()), encoding="utf-8")
    return 0 if well else 1


def _run(row: Row, minutes: float, install: bool, before: dict[str, Any], is_asked_for: bool) -> bool:
    """Runs a row and writes its result.

    Returns:
        Whether the row passed, or, if it cannot run here, whether it was not named.
    """
    print(f"{row.name}: ", end="", flush=True)
    try:
        python = prepared(row)
    except Unavailable as reason:
        print(f"skipped: {reason}", flush=True)
        if not before.get("passed"):  # a result of another machine stays
            _write({"name": row.name, "runs": row.runs, "system": system(), "outcome": f"skipped: {reason}", **stamp()})
        return not is_asked_for
    if install:
        print(python, flush=True)
        return True
    result = measured(row, python, minutes, ENVIRONMENTS / f"{row.name}.jsonl")
    _write(result)
    print(
        f"{result['outcome']}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped",
        flush=True,
    )
    return bool(result["outcome"] == "passed")


def _write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / f"{result['name']}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
