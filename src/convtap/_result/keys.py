"""The keys of calls: a layer's name, with the number of the call if the layer ran several times, then the part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


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
