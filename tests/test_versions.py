"""The matrix of versions: its page says what its results say, hangs and crashes included, and a row can be run alone."""

from __future__ import annotations

import json
import os
import re
import sys
import time

import pytest

import matrix.__main__ as command
from matrix.environment import Unavailable, interpreter
from matrix.page import COLUMNS, PAGE, page, results
from matrix.rows import PYTHONS, ROOT, TORCH, TORCHES, all_rows, chosen
from matrix.suite import events, outcome, run_within, sources

SUITE = """
import os, time
import pytest

def test_a(): pass

@pytest.mark.parametrize("x", [1, 2])
def test_b(x): assert x == 1, "x differs"

@pytest.mark.skip(reason="no fork")
def test_c(): pass

{last}
"""


def outcome_of(last: str, folder, *options: str, now: float = 0) -> dict:
    """Runs a suite of five tests in a process of its own, of which the last one is given."""
    (folder / "test_suite.py").write_text(SUITE.format(last=last))
    log = folder / "log.jsonl"
    environment = {**os.environ, "CONVTAP_MATRIX_LOG": str(log), "PYTHONPATH": str(ROOT)}
    suite = [sys.executable, "-m", "pytest", "-p", "matrix.watch", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    with open(folder / "output.txt", "w") as output:
        ended = run_within([*suite, *options, str(folder)], 120, output, environment)
    assert ended
    return outcome(events(log), ended, time.time() + now)


def test_a_run_that_ends_is_counted_and_its_failures_and_skips_are_named(tmp_path):
    found = outcome_of("def test_d(): pass", tmp_path, "-k", "not test_d")
    assert (found["outcome"], found["passed"], found["failed"], found["skipped"], found["left_out"]) == (
        "failed",
        2,
        1,
        1,
        1,
    )
    assert [(name.rpartition("::")[2], why) for name, why in found["failures"].items()] == [
        ("test_b[2]", "AssertionError: x differs")
    ]
    assert found["skips"] == {"Skipped: no fork": 1}


def test_a_test_that_ends_the_process_is_named(tmp_path):
    found = outcome_of("def test_d(): os._exit(3)", tmp_path)
    assert found["outcome"].startswith("crashed in ")
    assert found["outcome"].endswith("::test_d")
    assert found["passed"] == 2


def test_a_test_that_takes_longer_than_its_limit_is_named_as_a_hang(tmp_path):
    options = ["-o", "faulthandler_timeout=1", "-o", "faulthandler_exit_on_timeout=true"]
    found = outcome_of("def test_d(): time.sleep(120)", tmp_path, *options, now=600)
    assert found["outcome"].startswith("hung in ")
    assert found["outcome"].endswith("::test_d")


def test_a_command_is_ended_at_its_limit_with_what_it_started(tmp_path):
    script = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    with open(tmp_path / "output.txt", "w") as output:
        assert not run_within([sys.executable, "-c", script], 0.5, output, dict(os.environ))
    began = [{"event": "began", "test": "test_a", "at": 0.0}]
    assert outcome(began, False, 1.0)["outcome"] == "cut off by the time limit in test_a"
    assert outcome(began, False, 600.0)["outcome"] == "hung in test_a"


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page(results())


def test_the_page_has_a_row_for_each_python_torch_and_single_package():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][2:]
    assert names[: len(all_rows())] == [row.name for row in all_rows()]
    assert {f"python{python}-torch{TORCH}" for python in PYTHONS} <= set(names)
    assert {f"python3.11-torch{torch}" for torch in TORCHES} <= set(names)


def test_a_failure_and_a_hang_are_shown_and_a_row_that_was_not_run_says_so():
    hung = {"name": "numpy1.26.4", "runs": "core suite", "outcome": "hung in tests/a.py::b", "passed": 3, "failed": 1}
    text = page({"numpy1.26.4": {**hung, "failures": {"tests/c.py::d": "AssertionError: a | b"}}})
    row = next(line for line in text.splitlines() if line.startswith("| numpy1.26.4"))
    assert "| 3 | 1 |" in row
    assert "hung in tests/a.py::b" in row
    assert "`numpy1.26.4`: `tests/c.py::d`: AssertionError: a \\| b" in text
    assert next(line for line in text.splitlines() if line.startswith("| python3.10")).count("–") == len(COLUMNS) - 3
    assert "not run yet" in text


def test_the_hosted_workflow_runs_every_row():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    rows = re.findall(r"\{ row: (\S+), python: \"(\S+)\" \}", text)
    assert sorted(rows) == sorted((row.name, row.python) for row in all_rows())


def test_any_pair_can_be_run_and_another_name_is_refused():
    (row,) = chosen(["python3.12-torch2.10.0"])
    assert (row.python, row.packages, row.tests) == ("3.12", ("torch==2.10.0",), ("--core",))
    with pytest.raises(SystemExit, match="'torch2' is not a row. Pass one of python3.10-torch"):
        chosen(["torch2"])


def test_the_tests_of_a_row_are_there():
    for row in all_rows():
        for name in row.tests:
            file, _, test = name.partition("::")
            assert name == "--core" or f"def {test}" in (ROOT / file).read_text(encoding="utf-8")


def test_an_interpreter_is_found_by_its_version_and_a_missing_one_is_named():
    assert interpreter(f"{sys.version_info.major}.{sys.version_info.minor}").exists()
    with pytest.raises(Unavailable, match=r"python3\.99 is not installed on this machine"):
        interpreter("3.99")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Lets the command write into a folder of its own."""
    for name in ("RESULTS", "PAGE", "ENVIRONMENTS"):
        monkeypatch.setattr(command, name, tmp_path / name)
    monkeypatch.setattr("matrix.page.RESULTS", tmp_path / "RESULTS")
    (tmp_path / "RESULTS").mkdir()
    return tmp_path


def write(folder, **result):
    (folder / "RESULTS" / "python3.13t-torch2.13.0.json").write_text(
        json.dumps({"name": "python3.13t-torch2.13.0", "runs": "import", "date": "2026-01-01", **result})
    )


def test_a_row_that_passed_with_these_sources_is_not_run_again(elsewhere, capsys):
    write(elsewhere, outcome="passed", sources=sources())
    assert command.main(["python3.13t-torch2.13.0"]) == 0
    assert "passed on 2026-01-01 with the same sources" in capsys.readouterr().out


def test_a_row_that_cannot_run_here_is_skipped_with_the_reason_and_keeps_what_another_machine_measured(
    elsewhere, capsys, monkeypatch
):
    def unavailable(row):
        raise Unavailable("python3.13t is not installed on this machine")

    monkeypatch.setattr(command, "prepared", unavailable)
    assert command.main(["python3.13t-torch2.13.0"]) == 1
    assert "skipped: python3.13t is not installed" in capsys.readouterr().out
    assert "skipped: python3.13t is not installed" in (elsewhere / "PAGE").read_text()
    write(elsewhere, outcome="passed", passed=2, sources="other")
    command.main(["python3.13t-torch2.13.0"])
    assert "python3.13t is not installed" not in (elsewhere / "PAGE").read_text()
