"""What holds the package together: its public names, what imports what, and what importing it costs."""

from __future__ import annotations

import ast

import pytest

import convtap
from tests.conftest import BEYOND_CORE, NOT_ON_WINDOWS
from tests.process import run_python
from tests.structure import MODULES, ORDER, PACKAGE, ROOT, folder, imports


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Returns names each of which has an arrow to the next one, and the last to the first; or none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            found = search(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := search(name, []))), [])


def test_every_module_has_its_place_in_the_order():
    assert {folder(name) for name in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"__init__"}))
def test_a_module_imports_only_what_stands_above_its_folder(name):
    for imported in imports(MODULES[name]):
        above = ORDER.index(folder(imported)) < ORDER.index(folder(name))
        assert above or folder(imported) == folder(name), f"{name} imports {imported}"


def test_no_modules_import_each_other_in_a_circle():
    assert circle({name: imports(path) for name, path in MODULES.items()}) == []


def test_the_search_for_circles_can_fail():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def private_names(tree: ast.AST) -> set[str]:
    """The private attributes that the classes of a module have: methods, fields, slots, and what is set on ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found.add(member.name)
                elif isinstance(member, (ast.Assign, ast.AnnAssign)):
                    targets = member.targets if isinstance(member, ast.Assign) else [member.target]
                    found.update(target.id for target in targets if isinstance(target, ast.Name))
                    if "__slots__" in found and member.value is not None:
                        found.update(c.value for c in ast.walk(member.value) if isinstance(c, ast.Constant))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return {name for name in found if isinstance(name, str) and name.startswith("_") and not name.startswith("__")}


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
PRIVATE = {name: private_names(tree) for name, tree in TREES.items()}

#: Private names of torch and of the standard library that classes of the package happen to have as well.
NOT_OURS = {"_replace", "_modules", "_handle", "_values", "_parameters", "_buffers"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_touches_no_private_attribute_of_another_one(name):
    own = PRIVATE[name]
    others = set().union(*PRIVATE.values()) - own - NOT_OURS
    touched = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr in others and ast.unparse(node.value) not in ("self", "cls")
    ]
    assert touched == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_says_its_one_idea_in_its_first_line_and_stays_small(name):
    text = MODULES[name].read_text()
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


@pytest.mark.parametrize("name", [*BEYOND_CORE, *NOT_ON_WINDOWS])
def test_what_a_part_of_the_suite_leaves_out_is_there(name):
    file, _, test = name.partition("::")
    assert f"def {test.partition('[')[0]}" in (ROOT / "tests" / file).read_text()


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
