"""Finds each layer's reduction in a mapping from names and globs to functions."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from convtap._errors import LayerNotFound, did_you_mean, listed
from convtap._select.parts import split_key, splits
from convtap._select.selection import FUNCTION, Selection

#: A function of a tensor, or a mapping from names or globs of layers to such functions.
Reduce: TypeAlias = "Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]]"


class Reductions:
    """The reduction of each layer.

    An entry with the layer's own name is used first, then the first glob that matches.

    Args:
        given: a function for all layers, a mapping from names and globs (of layers, or of parts such as ``lstm[0]``), or None.
        selection: the selected layers.

    Raises:
        LayerNotFound: if an entry matches no selected layer.
    """

    def __init__(self, given: Reduce | None, selection: Selection) -> None:
        self._given = given
        self._layers = selection.modules
        self._known: dict[str, Callable[[Tensor], Tensor] | None] = {}
        if not isinstance(given, Mapping):
            return
        names = list(selection.names)
        kernels = [name for name, tensor in selection.tree.parameters() if tensor.dim() == 3]
        functions = filter(selection.wants, [*kernels, FUNCTION]) if selection.includes_functions else ()
        names.extend(name for name in functions if name not in selection.modules)
        self._given = {_clean(key, selection): function for key, function in given.items()}
        for key, clean in zip(given, self._given, strict=False):
            if not any(self._matches(clean, name) for name in names):
                shown = list(selection.names)
                raise LayerNotFound(
                    f"reduce has an entry for {key!r}, but it matches none of the selected layers: {listed(shown)}. Name "
                    f"one of them, or select the layer as well.{did_you_mean(key, names)}"
                )

    def of(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Returns the function of a layer or of a part of its output, or None."""
        given = self._given
        if not isinstance(given, Mapping):
            return given
        if name not in self._known:
            layer = split_key(name, self._layers)[0]
            keys = [key for key in (name, layer) if key in given]
            keys += [key for key in given if self._matches(key, name)]
            self._known[name] = given[keys[0]] if keys else None
        return self._known[name]

    def _matches(self, key: str, name: str) -> bool:
        layer, _, part = split_key(name, self._layers)
        if key in (name, layer) or fnmatch.fnmatchcase(layer, key):
            return True
        return any(path == part and fnmatch.fnmatchcase(layer, base) for base, path in splits(key))


def _clean(key: str, selection: Selection) -> str:
    """Returns a name without the prefixes of wrappers, or a glob unchanged."""
    for base, path in [(key, ""), *splits(key)]:
        name = selection.tree.resolve(base)
        if name is not None:
            return name + path
    return key
