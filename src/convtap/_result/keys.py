"""The keys of calls: the layer's name, the number of the call and the part."""

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
    """Returns the beginnings of names that contain ``#``, up to each ``#``.

    The calls of a layer with such a name need another separator.

    Examples:
        >>> stems(["conv", "conv#0"])
        {'conv'}
    """
    return {name[:place] for name in names if "#" in name for place, mark in enumerate(name) if mark == "#"}


def separator(name: str, taken: Container[str]) -> str:
    """Returns the separator before the number of a call.

    It is ``#``, or ``##`` if ``name#0`` may be the name of another layer.

    Args:
        name: the layer.
        taken: the ``stems`` of all layers' names.
    """
    return "##" if name in taken else "#"


def positions(names: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the number of each call within its layer, and the layer's call count.

    Dynamo traces this function, and torch 2.6 traces neither ``list.count`` nor ``Counter``.

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
    """Returns the key of each call from the layers' names in the order of the calls.

    Examples:
        >>> keys_of(["a", "b", "a"])
        ['a#0', 'b', 'a#1']
    """
    taken = stems(names)
    return [
        numbered(name, *position, separator(name, taken))
        for name, position in zip(names, positions(names), strict=True)
    ]
