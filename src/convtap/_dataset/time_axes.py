"""Finds the time axis of rows from the layers' types or the model's timeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from convtap._dataset.options import ExtractOptions
from convtap._dataset.valid_lengths import ValidLengths
from convtap._select.layer_layout import LayerLayouts, layout_of
from convtap._tensors.layout import Axes, axes_of, axes_with_time
from convtap._tensors.nested import walk_tensors


class RowAxes:
    """The axes of layers' outputs and of the rows made from them.

    Args:
        options: the options of the extraction. Without ``time_dim`` the last axis of the input is time, unless the layers
            contradict that.
        rule: the rule that cuts rows on their time axis; None if rows are not cut.

    Attributes:
        found: the axes of the latest row, by key.
    """

    def __init__(self, options: ExtractOptions, rule: ValidLengths | None) -> None:
        self.found: dict[str, Axes] = {}
        self._options = options
        self._at = options.capture.at
        self._layouts = LayerLayouts(options.selection.tree, self._at)
        self._rule = rule
        self._guide: ValidLengths | None = None
        self._looked = False

    def look(self, calls: Iterable[tuple[str, str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows a first batch through the model if a layer's time axis is unknown."""
        if self._rule is not None or self._looked or self._at == "activation":
            return
        unknown = {layer for layer, part, value in calls if self._is_unknown(layer, part, value)}
        if not unknown:
            return
        self._looked = True
        for dim in (-1, -2) if self._options.time_dim is None else (self._options.time_dim,):
            guide = ValidLengths(self._options, dim)
            try:
                guide.learn(args, kwargs, [], unknown)
            except Exception:  # the model cannot be followed on this axis
                continue
            if not self._is_contradicted(guide):
                self._guide = guide
                return

    def of(self, layer: str, part: str, path: str, shape: Sequence[int]) -> Axes:
        """Returns the axes of a tensor of a layer's output.

        Args:
            layer: the layer.
            part: the kept part of its output, such as ``"[0]"``; empty for the whole output.
            path: the path of the tensor in that part.
            shape: the shape of the tensor.
        """
        reduced = self._rule is None and self._options.reductions.of(layer + part) is not None
        place = part + path
        layout = self._layouts.of(layer, reduced=reduced) if place in ("", "[0]") else None
        usual = axes_of(shape, layout)
        guide = self._rule or self._guide
        if guide is None or (self._rule is None and usual.timed and layout is not None):
            return usual
        dim = guide.axis(layer, place)
        if dim == -1 and len(shape) == 2 and self._rule is not None:
            return Axes(None, -1)
        known = None if dim is None else axes_with_time(shape, dim, layout)
        if known is None:
            return usual
        return known._replace(sure=False, timed=False) if reduced else known

    def note(self, key: str, axes: Axes) -> None:
        """Notes the axes of a row. Time becomes unknown if rows of one key differ in it."""
        before = self.found.get(key)
        if before is not None and before.time != axes.time:
            axes = axes._replace(timed=False)
        self.found[key] = axes if before is None or before.timed else axes._replace(timed=False)

    def _is_unknown(self, layer: str, part: str, value: Any) -> bool:
        return any(not self.of(layer, part, path, tensor.shape).timed for path, tensor in walk_tensors(value))

    def _is_contradicted(self, guide: ValidLengths) -> bool:
        """Whether the timeline contradicts the time axis of a layer's type."""
        side = "input" if self._at == "input" else "output"
        for (name, path), runs in guide.times.items():
            module = self._options.selection.tree.names.get(name)
            layout = None if module is None or path not in ("", "[0]") else layout_of(module, side)
            for one in runs:
                usual = axes_of(one.shape, layout)
                if one.unknown is None and one.row_dim is not None and usual.timed and usual.time != one.row_dim:
                    return True
        return False
