"""What holds the package together: its public names, what imports what, and what importing it costs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import convtap
from tests.process import run_python

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "convtap"

#: A module may import only modules above it.
ORDER = (
    "_errors",
    "_table",
    "_structure",
    "_memory",
    "_functorch",
    "_tree",
    "_select",
    "_policy",
    "_grad",
    "_stats",
    "_coverage",
    "_call",
    "_log",
    "_samples",
    "_result",
    "_example",
    "_streams",
    "_pinned",
    "_flight",
    "_offload",
    "_hooks",
    "_frames",
    "_process",
    "_eager",
    "_passes",
    "_budget",
    "_keep",
    "_record",
    "taps.module",
    "_owners",
    "taps.activation",
    "taps.function",
    "taps.script",
    "taps.keras",
    "_verdict",
    "_undo",
    "_block",
    "_capture",
    "_sink",
    "_tapped",
    "_weigh",
    "_layers",
    "_axis",
    "_axis_count",
    "_mark",
    "_axis_op",
    "_axis_shape",
    "_axis_windows",
    "_axis_rules",
    "_axis_views",
    "_axis_table",
    "_axis_node",
    "_follow",
    "_lengths",
    "_layer_time",
    "_timeline",
    "_hit",
    "_top",
    "_save",
    "_chain",
    "_shards",
    "_reading",
    "_place",
    "_beginning",
    "_writer",
    "_index",
    "_account",
    "_store",
    "_views",
    "_identity",
    "_plan",
    "_rows",
    "_forward",
    "_interrupt",
    "_forecast",
    "_job",
    "_extract",
    "ray",
    "_probe",
    "_finding",
    "_watch",
    "_finite",
    "_metrics",
    "_pairs",
    "_stream",
    "_comparison",
    "_compare_models",
    "_compare",
    "_labels",
    "_cells",
    "_timeaxis",
    "_choose",
    "_signal",
    "_pictures",
    "_spread",
    "_figure",
    "_draw",
    "_spread_figure",
    "_multiples",
    "plot",
    "_png",
    "_svg",
    "_page",
    "_report_table",
    "_outline",
    "_gallery",
    "report",
    "_demo",
    "_factory",
    "_inputs",
    "_commands",
    "cli",
    "__main__",
)

#: Deferred, inside a function: what a method of the result hands over to.
DEFERRED = {("_result", "_save"), ("_result", "plot"), ("_result", "report"), ("_store", "_views")}


def imports(path: Path) -> set[tuple[str, bool]]:
    """The modules of the package that a file imports, each with whether only inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if (
            id(node) in typing_only
            or not isinstance(node, ast.ImportFrom)
            or not (node.module or "").startswith("convtap")
        ):
            continue
        module = (node.module or "").removeprefix("convtap").removeprefix(".")
        names = [module] if module else [alias.name for alias in node.names]
        found.update((name, id(node) in inside) for name in names)
    return found


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_above_it(name):
    for imported, deferred in imports(modules()[name]):
        if deferred and (name, imported) in DEFERRED:
            continue
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


@pytest.mark.parametrize("name", ORDER)
def test_a_module_says_its_one_idea_in_its_first_line_and_stays_small(name):
    text = modules()[name].read_text()
    first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    assert first.endswith("."), name
    assert len(text.splitlines()) <= 310, name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= 45, f"{name}.{node.name} has {lines} lines"


def test_all_is_sorted_and_complete():
    assert sorted(convtap.__all__) == convtap.__all__
    assert all(getattr(convtap, name) is not None for name in convtap.__all__)
    modules = type(convtap)
    public = {
        name for name, value in vars(convtap).items() if not name.startswith("_") and not isinstance(value, modules)
    }
    assert public - {"annotations", "TYPE_CHECKING", "Any"} == set(convtap.__all__)
    assert set(convtap.__all__) <= set(dir(convtap))
    with pytest.raises(AttributeError, match="has no attribute 'captur'"):
        convtap.captur  # noqa: B018


IMPORT = """
import sys
import torch
before = set(sys.modules)
import {module}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(name for name in new if name not in sys.stdlib_module_names))
"""


def test_importing_convtap_imports_torch_and_the_standard_library_only():
    done = run_python(IMPORT.format(module="convtap"))
    assert done.stdout.strip() == "['convtap']", done.stderr


def test_the_import_check_can_fail():
    done = run_python(IMPORT.format(module="safetensors"))
    assert done.stdout.strip() != "['convtap']"


def test_importing_convtap_does_not_import_dynamo_and_prints_nothing():
    done = run_python("import convtap, sys; assert 'torch._dynamo' not in sys.modules")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
