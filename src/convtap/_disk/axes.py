"""Which axis of the rows that are stored is time: asked of the layers' types, and of a timeline where those do not say it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from convtap._disk.chain import ValidLengths
from convtap._layer_layout import LayerLayouts, layout_of
from convtap._layout import Axes, axes_of, axes_with_time
from convtap._structure import walk_tensors
from convtap._time.timeline import Timeline
from convtap._tree import ModuleTree


class RowAxes:
    """The axes of the outputs that rows are made of, and of the rows that were made so far.

    Args:
        model: the model.
        tree: its modules.
        at: what of the layers is stored: ``"output"``, ``"input"`` or ``"activation"``.
        reduced: whether a function was applied to the outputs already.
        rule: what knows the time axis of each layer because rows are cut on it; None if they are not.
        time_dim: the axis of the model's input that is time; None if nobody says it, and it is the last one unless the layers
            contradict that.

    Attributes:
        found: by key, which axis of the latest row is time.
    """

    def __init__(
        self,
        model: nn.Module,
        tree: ModuleTree,
        at: str,
        reduced: bool,
        rule: ValidLengths | None,
        time_dim: int | None = None,
    ) -> None:
        self.found: dict[str, Axes] = {}
        self.time_dim = -1 if time_dim is None else time_dim
        self._model = model
        self._modules = tree.names
        self._layouts = LayerLayouts(tree, at, reduced)
        self._is_output = at == "output"
        self._reduced = reduced
        self._rule = rule
        self._guide: ValidLengths | None = None
        self._said = time_dim is not None
        self._looked = False

    def look(self, calls: Iterable[tuple[str, int, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows a first batch through the model, if a layer in it has a type that does not say its time axis."""
        if self._rule is not None or self._looked or not self._is_output:
            return
        if not any(self._is_unknown(layer, value) for layer, _, value in calls):
            return
        self._looked = True
        for dim in (self.time_dim,) if self._said else (-1, -2):
            guide = ValidLengths(self._model, dim)
            try:
                guide.learn(args, kwargs)
            except Exception:  # the model cannot be followed on this axis, so nothing is known by it
                continue
            if guide.times is not None and not self._contradicted(guide.times):
                self._guide = guide
                return

    def of(self, layer: str, path: str, shape: Sequence[int]) -> Axes:
        """Returns which axis is what in a tensor of a layer's output, which lies at a path such as ``""`` or ``"0"``."""
        layout = self._layouts.of(layer) if path in ("", "0") else None
        usual = axes_of(shape, layout)
        guide = self._rule or self._guide
        if guide is None or (self._rule is None and usual.timed):
            return usual
        dim = guide.axis(layer) if self._rule is not None else guide.axis_or_none(layer, path)
        known = None if dim is None else axes_with_time(shape, dim, layout)
        if known is None:
            return Axes(None, dim) if dim == -1 and len(shape) == 2 and self._rule is not None else usual
        return known._replace(sure=False, timed=False) if self._reduced else known

    def note(self, key: str, axes: Axes) -> None:
        """Notes which axis of a row is time; if rows of one key differ in that, it is no longer known."""
        before = self.found.get(key)
        if before is not None and before.time != axes.time:
            axes = axes._replace(timed=False)
        self.found[key] = axes if before is None or before.timed else axes._replace(timed=False)

    def _is_unknown(self, layer: str, value: Any) -> bool:
        return any(not self.of(layer, path, tensor.shape).timed for path, tensor in walk_tensors(value))

    def _contradicted(self, times: Timeline) -> bool:
        """Whether a layer that knows its own time axis has another one by the timeline."""
        for one in times.everything():
            module = self._modules.get(one.name)
            layout = None if module is None or one.path not in ("", "0") else layout_of(module)
            usual = axes_of(one.shape, layout)
            if one.unknown is None and one.row_dim is not None and usual.timed and usual.time != one.row_dim:
                return True
        return False
