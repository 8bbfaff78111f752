"""Selects and reads parts of an output, written behind the layer: ``lstm[0]``, ``block[hidden][1]``."""

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
# Assumption: a text that ends with a bracket can be three things: a module of just that name, a glob whose last character is
#   one of a class ("conv[12]"), or a part of what a module returns ("lstm[0]").
# Failure: read in the wrong way, it selects other layers, in silence.
# Choice: a module of just that name comes first. Then a part, if what stands before it selects modules that may return
#   more than one tensor, by name or by glob. Else it is a glob; also if that matches and the brackets hold what reads like a
#   class ("[12]", "[0-9]", "[!0]"), or the part would be one of convolutions. A part that a layer does not have is an error
#   when the layer runs.

_SINGLE = (nn.modules.conv._ConvNd, nn.Linear)
_TRAILING = re.compile(r"(\[[^\[\]]+\])+")
_CLASS = re.compile(r"\[(!.+|.+-.+|\d\d+)\]$")
_NUMBERED = re.compile(r"(.+?)##?(\d+)", re.DOTALL)


def splits(text: str) -> list[tuple[str, str]]:
    """Returns every way to read a text as a name and the path of a part, the longest name first."""
    if not text.endswith("]"):
        return []
    places = [place for place, mark in enumerate(text) if mark == "[" and place]
    return [(text[:place], text[place:]) for place in reversed(places) if _TRAILING.fullmatch(text[place:])]


@dataclass(frozen=True)
class Part:
    """A part that is asked for: its path, of which modules, and whether by an exact name."""

    path: str
    names: list[str]
    exact: bool


def read_part(text: str, tree: ModuleTree, typed: Mapping[str, nn.Module], owners: Container[str]) -> Part | None:
    """Reads a selector as a part, or returns None if it is none. See Note: [Names with brackets].

    Args:
        text: what was asked for.
        tree: the modules of the model.
        typed: those among which a glob chooses.
        owners: the names of parameters that are no module's weight.

    Raises:
        LayerNotFound: it is the part of a module that has none.
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
            raise LayerNotFound(f"{name!r} is a {kind}, whose output has no part {path}. Select it whole: {name!r}.")
        return Part(path, [name], True)
    for base, path in reversed(ways):
        names = [name for name in typed if fnmatch.fnmatchcase(name, base) and not returns_one_tensor(typed[name])]
        as_class = is_glob and (_is_class(path) or all(isinstance(typed[name], _SINGLE) for name in names))
        if names and not as_class and any(mark in base for mark in "*?["):
            return Part(path, names, False)
    return None


def find(key: str, call_of: Callable[[str], Any]) -> Any:
    """Returns the output of a call by its key, or the part of it that the key asks for; ``MISSING`` without such a call.

    Raises:
        LayerNotFound: the output has no such part.
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
    """Whether the last brackets hold what reads like a glob's class: a range, a negation, several digits."""
    return _CLASS.search(part) is not None


def outermost(parts: Iterable[str]) -> tuple[str, ...]:
    """Leaves out parts that lie in others."""
    every = list(dict.fromkeys(parts))
    return tuple(part for part in every if not any(part.startswith(f"{other}[") for other in every))


def returns_one_tensor(module: nn.Module) -> bool:
    """Whether a module is one of torch's own that return a single tensor, and so has no parts."""
    forward: Any = getattr(type(module), "forward", None)
    plain = getattr(forward, "__module__", "").startswith("torch.nn.modules") and "forward" not in module.__dict__
    return plain and isinstance(module, _SINGLE)


def split_key(key: str, layers: Container[str]) -> tuple[str, int | None, str]:
    """Splits a key into the layer, the number of its call (None without one) and the path of a part.

    Args:
        key: such as ``conv``, ``conv#1``, ``lstm[0]`` or ``lstm#1[0]``.
        layers: the names that are known; of several ways to read a key, the one with the longest known name counts.
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
    """Says that a layer's output, or input, has no such part."""
    there = [f"{layer}{path}" for path, leaf in walk_leaves(value) if path and leaf is not None]
    if not there:
        what = f"it is a single {type(value).__name__}"
        return LayerNotFound(f"{layer!r} has no part {part}: {what}. Select it whole: {layer!r}.")
    return LayerNotFound(f"{layer!r} has no part {part}. Select one of those that it has: {listed(there)}.")
