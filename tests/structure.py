"""The modules of the package, the order of its folders, and which module imports which."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "convtap"

#: The steps of the flow. A module may import only from its own folder and from what stands above it here.
ORDER = (
    "_public",
    "_spelling",
    "_errors",
    "_table",
    "_atomic_write",
    "_torch",
    "_tensors",
    "_select",
    "_result",
    "_offload",
    "_record",
    "_taps",
    "_capture",
    "_time",
    "_dataset",
    "ray",
    "_debug",
    "_view",
    "plot",
    "report",
    "_cli",
    "cli",
    "__main__",
    "_old_paths",
)


def modules() -> dict[str, Path]:
    """Returns the file of each module, by the module's name within the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Returns the modules of the package that a file imports, also inside functions, but not for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only or node.level:
            continue
        package, _, module = (node.module or "").partition(".")
        if package == "convtap":
            members = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= members & MODULES.keys() or {module}
    return found


def folder(name: str) -> str:
    """Returns the folder of a module; a module beside the folders stands for itself."""
    return name.partition(".")[0]


def arrows() -> dict[str, set[str]]:
    """Returns which other folders each folder imports from, in the order of the flow."""
    found: dict[str, set[str]] = {room: set() for room in ORDER}
    for name in MODULES.keys() - {"__init__"}:
        found[folder(name)] |= {folder(other) for other in imports(MODULES[name])} - {folder(name)}
    return found
