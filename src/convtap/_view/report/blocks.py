"""Groups layers by block, so that a page with many layers can be folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from convtap._select.module_tree import ROOT

#: The maximum number of layers in one list.
MOST_UNFOLDED = 40

#: The size of the parts that a block of more than MOST_UNFOLDED layers is cut into.
_PART = 20


class Block(NamedTuple):
    """Layers of one block, or of a part of it.

    Attributes:
        names: the name of the block, or the first and the last call of a part.
        positions: the positions of its calls in the list.
    """

    names: tuple[str, ...]
    positions: list[int]


def blocks(items: Sequence[tuple[str, str]]) -> list[Block] | None:
    """Groups calls, given as (key, layer), by block in order of first calls.

    The block of a layer is the innermost module that contains another layer of the list. The result is None if there are at
    most MOST_UNFOLDED calls.
    """
    if len(items) <= MOST_UNFOLDED:
        return None
    found: dict[str, list[int]] = {}
    block = _blocks(dict.fromkeys(layer for _, layer in items))
    for position, (_, layer) in enumerate(items):
        found.setdefault(block[layer], []).append(position)
    return [part for name, positions in found.items() for part in _parts(name, positions, items)]


def _blocks(layers: dict[str, None]) -> dict[str, str]:
    """Returns the block of each layer."""
    counts = Counter(module for layer in layers for module in modules_around(layer))
    return {layer: next((module for module in modules_around(layer) if counts[module] > 1), ROOT) for layer in layers}


def parts_of(name: str) -> list[str]:
    """Returns the parts of a layer's name between its dots; ``F.conv1d`` is one part."""
    return [name] if name == "F.conv1d" else name.split(".")


def modules_around(layer: str) -> list[str]:
    """Returns the modules around a layer, innermost first, without the root."""
    parts = parts_of(layer)
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]


def _parts(name: str, positions: list[int], items: Sequence[tuple[str, str]]) -> list[Block]:
    label = "outside any block" if name == ROOT else name
    if len(positions) <= MOST_UNFOLDED:
        return [Block((label,), positions)]
    cuts = [positions[start : start + _PART] for start in range(0, len(positions), _PART)]
    return [Block((items[cut[0]][0], items[cut[-1]][0]), cut) for cut in cuts]
