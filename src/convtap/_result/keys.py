"""The keys of calls: a layer's name, with the number of the call if the layer ran several times, then the part."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence


def numbered(name: str, index: int, count: int, separator: str = "#", part: str = "") -> str:
    """Returns the key of one of ``count`` calls of a layer.

    Examples:
        >>> numbered("conv", 0, 1), numbered("conv", 1, 2), numbered("lstm", 1, 2, part="[0]")
        ('conv', 'conv#1', 'lstm#1[0]')
    """
    return name + part if count == 1 else f"{name}{separator}{index}{part}"


def stems(names: Iterable[str]) -> set[str]:
    """Returns what precedes each ``#`` in some names: the names of layers whose calls need another separator.

    Examples:
        >>> stems(["conv", "conv#0"])
        {'conv'}
    """
    return {name[:place] for name in names if "#" in name for place, mark in enumerate(name) if mark == "#"}


def separator(name: str, taken: Container[str]) -> str:
    """Returns what precedes the number of a call: ``#``, or ``##`` if ``name#0`` could be the name of another layer.

    Args:
        name: the layer.
        taken: the ``stems`` of all layers' names.
    """
    return "##" if name in taken else "#"


def positions(names: Sequence[str]) -> list[tuple[int, int]]:
    """Returns for each call its number among the calls of its layer, and how many those are, by the layers' names.

    It is compiled too, and torch 2.6 traces neither ``list.count`` nor a ``Counter``.

    Examples:
        >>> positions(["a", "b", "a"])
        [(0, 2), (0, 1), (1, 2)]
    """
    counts: dict[str, int] = {}
    numbers = []
    for name in names:
        numbers.append(counts.get(name, 0))
        counts[name] = numbers[-1] + 1
    return [(number, counts[name]) for name, number in zip(names, numbers, strict=True)]


def keys_of(names: Sequence[str]) -> list[str]:
    """Returns the key of each call, given the layers' names in the order of the calls.

    Examples:
        >>> keys_of(["a", "b", "a"])
        ['a#0', 'b', 'a#1']
    """
    taken = stems(names)
    return [
        numbered(name, *position, separator(name, taken))
        for name, position in zip(names, positions(names), strict=True)
    ]
