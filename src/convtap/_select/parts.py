"""Selects and reads parts of an output: ``lstm[0]``, ``block[hidden][1]``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from convtap._errors import LayerNotFound, listed
from convtap._select.module_tree import ModuleTree
from convtap._tensors.nested import MISSING, part_of, walk_leaves

# Note: [Names with brackets]
# Assumption: a text that ends with a bracket can mean three things: a module with this name, a glob with a character class
#   ("conv[12]"), or a part of a module's output ("lstm[0]").
# Failure: the wrong interpretation silently selects other layers.
# Choice: a module with this name has priority. Next is a part, if the text before it selects, by name or by glob, modules
#   that may return more than one tensor. Otherwise it is a glob. A matching glob has priority over a part if the brackets
#   look like a character class ("[12]", "[0-9]", "[!0]"), or if the part would belong to convolutions. If a layer does not
#   have the selected part, that is an error when the layer runs.

_SINGLE = (nn.modules.conv._ConvNd, nn.Linear)
_TRAILING = re.compile(r"(\[[^\[\]]+\])+")
_CLASS = re.compile(r"\[(!.+|.+-.+|\d\d+)\]$")
_NUMBERED = re.compile(r"(.+?)##?(\d+)", re.DOTALL)


def splits(text: str) -> list[tuple[str, str]]:
    """Returns all ways to split a text into a name and a part's path.

    The longest name comes first.
    """
    if not text.endswith("]"):
        return []
    places = [place for place, mark in enumerate(text) if mark == "[" and place]
    return [(text[:place], text[place:]) for place in reversed(places) if _TRAILING.fullmatch(text[place:])]


@dataclass(frozen=True)
class Part:
    """A selected part of some modules' outputs.

    Attributes:
        path: the path of the part.
        names: the names of the modules.
        exact: whether an exact name selected the part, not a glob.
    """

    path: str
    names: list[str]
    exact: bool


def read_part(text: str, tree: ModuleTree, typed: Mapping[str, nn.Module], owners: Container[str]) -> Part | None:
    """Reads a selector as a part, or returns None. See Note: [Names with brackets].

    Args:
        text: the selector.
        tree: the modules of the model.
        typed: the modules that a glob can match.
        owners: the names of parameters that are not the weight of a module.

    Raises:
        LayerNotFound: if the module's output does not have parts.
    """
    ways = splits(text)
    if not ways or tree.resolve(text) is not None or text in owners:
        return None
    is_glob = any(fnmatch.fnmatchcase(name, text) for name in typed)
    for base, path in ways:
        name = tree.resolve(base)
        alone = name is not None and returns_one_tensor(tree.names[name])
        if name is None or (is_glob and (alone or _is_class(path))):
            continue
        if alone:
            kind = type(tree.names[name]).__name__
            raise LayerNotFound(
                f"{name!r} is a {kind}, whose output has no part {path}. Select the whole layer: {name!r}."
            )
        return Part(path, [name], True)
    for base, path in reversed(ways):
        names = [name for name in typed if fnmatch.fnmatchcase(name, base) and not returns_one_tensor(typed[name])]
        as_class = is_glob and (_is_class(path) or all(isinstance(typed[name], _SINGLE) for name in names))
        if names and not as_class and any(mark in base for mark in "*?["):
            return Part(path, names, False)
    return None


def find(key: str, call_of: Callable[[str], Any]) -> Any:
    """Returns the output, or its part, that a key names, or ``MISSING``.

    Raises:
        LayerNotFound: if the output does not have the part.
    """
    for name, path in [(key, ""), *splits(key)]:
        call = call_of(name)
        if call is not None:
            found = part_of(call.output, path)
            if found is MISSING:
                raise no_part(name, path, call.output)
            return found
    return MISSING


def _is_class(part: str) -> bool:
    """Returns whether the last brackets look like a character class of a glob.

    It is a range, a negation, or several digits.
    """
    return _CLASS.search(part) is not None


def outermost(parts: Iterable[str]) -> tuple[str, ...]:
    """Returns the parts that are not inside other parts."""
    every = list(dict.fromkeys(parts))
    return tuple(part for part in every if not any(part.startswith(f"{other}[") for other in every))


def returns_one_tensor(module: nn.Module) -> bool:
    """Returns whether a module is a torch module that returns a single tensor."""
    forward: Any = getattr(type(module), "forward", None)
    plain = getattr(forward, "__module__", "").startswith("torch.nn.modules") and "forward" not in module.__dict__
    return plain and isinstance(module, _SINGLE)


def split_key(key: str, layers: Container[str]) -> tuple[str, int | None, str]:
    """Splits a key into the layer, the number of the call or None, and a part's path.

    Args:
        key: a key such as ``conv``, ``conv#1``, ``lstm[0]`` or ``lstm#1[0]``.
        layers: the known names. If a key can be split in several ways, the longest known name is used.
    """
    ways = [(key, ""), *((key[:place], key[place:]) for place in _brackets(key))]
    for base, part in ways:
        if base in layers:
            return base, None, part
        numbered = _NUMBERED.fullmatch(base)
        if numbered is not None and numbered[1] in layers:
            return numbered[1], int(numbered[2]), part
    base, part = ways[-1]
    numbered = _NUMBERED.fullmatch(base)
    return (base, None, part) if numbered is None else (numbered[1], int(numbered[2]), part)


def _brackets(key: str) -> Iterator[int]:
    return (place for place in range(len(key) - 1, 0, -1) if key[place] == "[")


def no_part(layer: str, part: str, value: Any) -> LayerNotFound:
    """Returns the error for a part that a layer's output or input does not have."""
    there = [f"{layer}{path}" for path, leaf in walk_leaves(value) if path and leaf is not None]
    if not there:
        what = f"it is a single {type(value).__name__}"
        return LayerNotFound(f"{layer!r} has no part {part}, because {what}. Select the whole layer: {layer!r}.")
    return LayerNotFound(f"{layer!r} has no part {part}. Select one of its parts: {listed(there)}.")
