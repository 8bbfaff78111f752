"""Writes ``docs/architecture.md`` from the code: ``python -m docs.make_architecture``.

It writes the picture and the lists.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from docs.draw_flow import picture, summary
from docs.private_names import NOT_TORCH, OPERATOR_TABLES, PRIVATE
from tests.structure import MODULES, ORDER, ROOT, folder

PAGE = Path(__file__).parent / "architecture.md"
PICTURE = Path(__file__).parent / "architecture.svg"

#: Where things happen: what, and the function or class that does it.
PLACES = {
    "the options of a capture are checked": "_capture.capture_options",
    "taps, recorder and log are connected, and removed again": "_capture.Session",
    "the layers are selected": "_select.select",
    "the owner of a weight is found": "_select.Owners",
    "the call of a module is observed": "_taps.ModuleTap",
    "the call of a convolution function is observed": "_taps.ConvolutionTap",
    "the kernels of the convolution key are registered": "_torch._register",
    "the private parts of torch are tested": "_torch.run",
    "an output becomes a call of the log": "_record.Recorder",
    "a forward pass is counted": "_record.Passes",
    "an output is reduced, cast and copied": "_record.Policy",
    "a snapshot is taken": "_tensors.snapshot",
    "a kept tensor moves to another device": "_offload.Offloader",
    "kept bytes are counted against `max_bytes`": "_record.Budget",
    "a gradient is attached to its call": "_record.Gradients",
    "a key is formatted (`conv`, `conv#1`, `lstm#1[0]`)": "_result.numbered",
    "a missing layer becomes an error or a warning": "_record.report_missing",
    "outputs are split by input": "_result.Samples",
    "the base class of all errors is defined": "_errors.ConvtapError",
    "a file becomes visible, whole or not at all": "_atomic_write.write_whole",
    "the bytes of a shard are laid out": "_dataset.write_shard",
    "a shard becomes visible": "_dataset.ShardPublisher",
    "a sample is found in a store": "_dataset.Index",
}

_DEFINED = re.compile(r"^\s*# Note: \[([^\]]+)\]", re.MULTILINE)
_NAMED = re.compile(r"Note: \[([^\]]+)\]")
_LIST = re.compile(r"(<!-- made: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """Returns the page with the lists between its markers written anew."""

    def made(found: re.Match[str]) -> str:
        kind, _, rest = found[2].partition(" ")
        lines = {"modules": modules, "places": places, "notes": notes, "private": private}[kind](*rest.split())
        return f"{found[1]}\n" + "\n".join(lines) + f"\n\n{found[3]}"

    return _LIST.sub(made, text)


def link(name: str) -> str:
    """Returns a link to the file of a module."""
    path = MODULES[name].relative_to(ROOT).as_posix()
    return f"[{path.removeprefix('src/convtap/')}](../{path})"


def modules(*rooms: str) -> Iterator[str]:
    """Yields the modules of a folder, or single modules, each with its first line."""
    yield from ("| module | what it does |", "|---|---|")
    for name in sorted(MODULES.keys()):
        is_folder = f"{name}.__init__" in MODULES or MODULES[name].name == "__init__.py"
        if folder(name) in rooms and not is_folder:
            yield f"| {link(name)} | {summary(name)} |"


def places() -> Iterator[str]:
    """Yields where things happen.

    Raises:
        LookupError: a function of the list is not defined in its folder, or twice.
    """
    yield from ("| where | function or class | file |", "|---|---|---|")
    for what, place in PLACES.items():
        room, _, name = place.partition(".")
        found = [m for m, path in MODULES.items() if folder(m) == room and name in definitions(path)]
        if len(found) != 1:
            raise LookupError(f"{place} is defined in {found}. Correct PLACES in {Path(__file__).name}.")
        yield f"| {what} | `{name}` | {link(found[0])} |"


def definitions(path: Path) -> set[str]:
    """Returns the functions and classes that a module defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def notes() -> Iterator[str]:
    """Yields the named notes, in the order of the folders."""
    yield from ("| note | file |", "|---|---|")
    found = [(ORDER.index(folder(module)), module, note) for note, module in defined_notes()]
    yield from (f"| {note} | {link(module)} |" for _, module, note in sorted(found))


def defined_notes() -> list[tuple[str, str]]:
    """Returns each named note with its module."""
    return [
        (note, name)
        for name, path in MODULES.items()
        if name != "__init__"
        for note in _DEFINED.findall(path.read_text())
    ]


def named_notes() -> set[str]:
    """Returns the notes that something names."""
    return {note for path in MODULES.values() for note in _NAMED.findall(path.read_text())}


# -- private names of torch


def private(which: str) -> Iterator[str]:
    """Yields the private names of torch: those that only ``_torch`` uses (``inside``), or the others (``outside``)."""
    yield from ("| private names | used in | if they go away |", "|---|---|---|")
    for names, sentence in PRIVATE:
        users = sorted({module for name in names for module in using(name)})
        is_inside = all(folder(module) == "_torch" for module in users)
        if is_inside == (which == "inside"):
            written = ", ".join(f"`{name}`" for name in names)
            yield f"| {written} | {', '.join(link(module) for module in users)} | {sentence} |"


def using(name: str) -> list[str]:
    """Returns the modules that use a private name."""
    return [module for module, names in USES.items() if name.rpartition(".")[2] in names]


def uses(tree: ast.Module) -> Iterator[str]:
    """Yields the names that a module takes of others: attributes, imports, and text that is a name."""
    aside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__slots__", "__all__"):
            aside |= {id(child) for child in ast.walk(node)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            aside.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("convtap"):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
            words = node.value.split()
            if all(re.fullmatch(r"[A-Za-z_][\w.]*", word) for word in words):
                yield from (part for word in words for part in word.split("."))


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yields the names that a module defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            yield from (str(child.value) for child in ast.walk(node.value) if isinstance(child, ast.Constant))


_TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
USES = {name: set(uses(tree)) for name, tree in _TREES.items()}


def unexplained() -> dict[str, list[str]]:
    """Returns the private names that are neither the package's own nor explained, each with the modules that use it."""
    explained = {part for names, _ in PRIVATE for name in names for part in name.split(".")} | NOT_TORCH
    own = {name for tree in _TREES.values() for name in own_names(tree)} | set(ORDER)
    found: dict[str, list[str]] = {}
    for module, names in USES.items():
        for name in names - explained - own:
            is_operator = folder(module) == OPERATOR_TABLES and name in torch_operators()
            if name.startswith("_") and not name.startswith("__") and not is_operator:
                found.setdefault(name, []).append(module)
    return found


def torch_operators() -> set[str]:
    """Returns the names of torch's operators without their namespace."""
    import torch

    return {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}


def main() -> None:
    """Writes the page and the picture."""
    PAGE.write_text(page(PAGE.read_text()))
    PICTURE.write_text(picture())


if __name__ == "__main__":
    sys.exit(main())
