"""A Python without the global lock is refused when convtap is imported, and one that has it is not."""

from __future__ import annotations

import sysconfig

from tests.process import run_python

IS_FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

SCRIPT = """
import sys
if len(sys.argv) > 1:
    sys._is_gil_enabled = lambda: sys.argv[1] == "True"
import convtap
print("imported")
"""


def test_a_python_without_its_global_lock_is_refused_by_a_sentence():
    done = run_python(SCRIPT, "False")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == (
        "ImportError: this Python runs without its global interpreter lock, and convtap needs it to count calls. "
        "Set PYTHON_GIL=1 in the environment, or start python -X gil=1."
    )


def test_a_free_threaded_build_with_its_lock_on_imports():
    assert run_python(SCRIPT, "True").stdout == "imported\n"


def test_this_python_is_refused_only_if_it_runs_without_its_lock():
    code = "import sys, torch; print(getattr(sys, '_is_gil_enabled', lambda: True)())"
    for variables in [{"PYTHON_GIL": "0"}, {"PYTHON_GIL": "1"}] if IS_FREE_THREADED else [{}]:
        has_lock = run_python(code, variables=variables).stdout.strip()
        assert has_lock == str(variables.get("PYTHON_GIL") != "0")
        assert (run_python(SCRIPT, variables=variables).returncode == 0) == (has_lock == "True")
