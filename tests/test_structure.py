"""What holds the package together: its public names, what imports what, and what importing it costs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import convtap
from tests.conftest import BEYOND_CORE
from tests.process import run_python

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "convtap"

#: A module may import only modules above it.
ORDER = (
    "_torch.references",
    "_torch.hooks",
    "_torch.transforms",
    "_torch.call_stack",
    "_torch.modes",
    "_torch.convolution_key",
    "_torch.weight_marks",
    "_torch.weight_reads",
    "_torch.call_shim",
    "_torch.dynamo_import",
    "_torch.compiled_regions",
    "_torch.cleanup",
    "_errors",
    "_torch.self_test",
    "_torch.compile_stance",
    "_table",
    "_atomic",
    "_structure",
    "_memory",
    "_tree",
    "_arguments",
    "_parts",
    "_select",
    "_layout",
    "_layer_layout",
    "_reduce",
    "_policy",
    "_grad",
    "_keys",
    "_stats",
    "_coverage",
    "_call",
    "_log",
    "_samples",
    "_summary",
    "_result",
    "_put_back",
    "_torch.script_state",
    "_state",
    "_example",
    "_batch",
    "_streams",
    "_pinned",
    "_flight",
    "_offload",
    "_torch.frame_marks",
    "_body_calls",
    "_passes",
    "_budget",
    "_keep",
    "_record",
    "taps.module",
    "taps.parts",
    "_owners",
    "taps.activation",
    "taps.keras",
    "taps.convolutions",
    "_verdict",
    "_block",
    "_capture",
    "_sink",
    "_functional",
    "_tapped",
    "_weigh",
    "_layers",
    "_time.axis",
    "_time.axis_count",
    "_time.axis_edge",
    "_time.mark",
    "_time.axis_join",
    "_time.axis_op",
    "_time.axis_shape",
    "_time.axis_windows",
    "_time.axis_folds",
    "_time.axis_products",
    "_time.axis_rules",
    "_time.axis_views",
    "_time.axis_table",
    "_time.axis_node",
    "_time.signal",
    "_time.origins",
    "_time.record",
    "_time.watching",
    "_time.follow",
    "_time.lengths",
    "_time.layer_time",
    "_time.padded",
    "_time.timeline",
    "_time.hit",
    "_time.top",
    "_save",
    "_disk.chain",
    "_disk.axes",
    "_disk.shards",
    "_disk.reading",
    "_disk.place",
    "_disk.beginning",
    "_disk.writer",
    "_disk.index",
    "_disk.account",
    "_disk.store",
    "_disk.ragged",
    "_disk.views",
    "_disk.identity",
    "_disk.contents",
    "_disk.names",
    "_disk.state",
    "_disk.plan",
    "_disk.rows",
    "_disk.forward",
    "_disk.interrupt",
    "_disk.forecast",
    "_disk.job",
    "_disk.extract",
    "ray",
    "_debug.probe",
    "_debug.finding",
    "_debug.watch",
    "_debug.finite",
    "_debug.metrics",
    "_debug.pairs",
    "_debug.stream",
    "_debug.comparison",
    "_debug.plan",
    "_debug.compare_models",
    "_debug.compare",
    "_view.labels",
    "_view.cells",
    "_view.timeaxis",
    "_view.choose",
    "_view.orient",
    "_view.signal",
    "_view.pictures",
    "_view.spread",
    "_view.figure",
    "_view.draw",
    "_view.spread_figure",
    "_view.multiples",
    "plot",
    "_view.png",
    "_view.svg",
    "_view.page",
    "_view.report_table",
    "_view.outline",
    "_view.gallery",
    "report",
    "_command.demo",
    "_command.factory",
    "_command.inputs",
    "_command.commands",
    "cli",
    "__main__",
)

#: Deferred, inside a function: what a method of the result hands over to.
DEFERRED = {("_result", "_save"), ("_result", "plot"), ("_result", "report"), ("_disk.store", "_disk.views")}


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
        inside_package = not module or (PACKAGE / module.replace(".", "/")).is_dir()
        prefix = f"{module}." if module else ""
        names = [prefix + alias.name for alias in node.names] if inside_package else [module]
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


@pytest.mark.parametrize("name", BEYOND_CORE)
def test_what_the_core_of_the_suite_leaves_out_is_there(name):
    file, _, test = name.partition("::")
    assert f"def {test.partition('[')[0]}" in (ROOT / "tests" / file).read_text()


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
