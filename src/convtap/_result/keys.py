"""The keys of calls: a layer's name, with the number of the call if the layer ran several times, then the part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from convtap._errors import LayerNotFound, brief, listed


def numbered(name: str, index: int, count: int, separator: str = "#", part: str = "") -> str:
    """Returns the key of one of ``count`` calls of a layer.

    Example:
        >>> numbered("conv", 0, 1), numbered("conv", 1, 2), numbered("lstm", 1, 2, part="[0]")
        ('conv', 'conv#1', 'lstm#1[0]')
    """
    return name + part if count == 1 else f"{name}{separator}{index}{part}"


def separator(name: str, names: Iterable[str]) -> str:
    """Returns what precedes the number of a call: ``#``, or ``##`` if ``name#0`` could be the name of another layer."""
    return "##" if any(other.startswith(name + "#") for other in names) else "#"


def keys_of(names: Sequence[str]) -> list[str]:
    """Returns the key of each call, given the layers' names in the order of the calls.

    Example:
        >>> keys_of(["a", "b", "a"])
        ['a#0', 'b', 'a#1']
    """
    counts = Counter(names)
    clashing = [name for name in counts if "#" in name]
    numbers = dict.fromkeys(counts, 0)
    found = []
    for name in names:
        found.append(numbered(name, numbers[name], counts[name], separator(name, clashing)))
        numbers[name] += 1
    return found


def no_name(key: Any, names: Sequence[str], keys: Iterable[str]) -> LayerNotFound:
    """Returns the error for something that is not a name, such as the position of a call.

    Args:
        key: what was asked for.
        names: the layers' names in the order of the calls.
        keys: the keys of the calls.
    """
    if isinstance(key, int) and not isinstance(key, bool) and -len(names) <= key < len(names):
        position = key % len(names)
        return LayerNotFound(
            f"acts[{key}]: keys are names; {_ordinal(position + 1)} call is acts.calls()[{position}], "
            f"layer {names[position]!r}."
        )
    return LayerNotFound(f"acts[{brief(key)}]: keys are names, and these are here: {listed(keys)}.")


def _ordinal(number: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    return f"the {words[number - 1]}" if number <= len(words) else f"call number {number}"
