"""Reports whether each selected layer was captured, idle or bypassed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from convtap._errors import plural
from convtap._public import public
from convtap._spelling import printable_repr
from convtap._table import MOST, Rows, Table

_STATES = ("captured", "not activated", "idle", "bypassed")


@public
@printable_repr
@dataclass(frozen=True)
class LayerCoverage:
    """The coverage of one selected layer.

    Attributes:
        name: the layer.
        captured: the number of its captured calls.
        bypassed: the code that read its weight although convtap saw no convolution, or None.
        bypasses: the number of forward passes in which that happened.
        unactivated: with ``at="activation"``, the number of its calls whose output no activation used.
        computed: whether a convolution ran with a weight computed from this layer's. Its output has the name ``F.conv1d``.
    """

    name: str
    captured: int
    bypassed: str | None = None
    bypasses: int = 0
    computed: bool = False
    unactivated: int = 0

    @property
    def state(self) -> str:
        """One of ``"captured"``, ``"not activated"``, ``"bypassed"`` and ``"idle"``."""
        if self.captured:
            return "captured"
        if self.unactivated:
            return "not activated"
        return "bypassed" if self.bypasses else "idle"

    def __str__(self) -> str:
        missed = f"bypassed in {plural(self.bypasses, 'pass')}: weight read by {self.bypassed}" if self.bypasses else ""
        alone = f"ran {plural(self.unactivated, 'time')} without an activation after it" if self.unactivated else ""
        if self.captured:
            return ", ".join(part for part in (f"captured {plural(self.captured, 'time')}", alone, missed) if part)
        if alone:
            return alone
        if self.computed:
            return "idle (a convolution with a weight computed from its own has the name 'F.conv1d')"
        return missed or "idle"


@public
class Coverage(Mapping[str, LayerCoverage]):
    """The coverage of each selected layer, by name."""

    def __init__(self, layers: Sequence[LayerCoverage], notes: Sequence[str] = ()) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self.notes = tuple(notes)

    def __getitem__(self, name: str) -> LayerCoverage:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _in_state(self, state: str) -> list[str]:
        return [name for name, layer in self._layers.items() if layer.state == state]

    @property
    def captured(self) -> list[str]:
        """The layers with at least one captured call."""
        return self._in_state("captured")

    @property
    def idle(self) -> list[str]:
        """The layers that did not run, as far as convtap saw."""
        return self._in_state("idle")

    @property
    def unactivated(self) -> list[str]:
        """With ``at="activation"``, the layers with a call that no activation followed."""
        return [name for name, layer in self._layers.items() if layer.unactivated]

    @property
    def bypassed(self) -> list[str]:
        """The layers whose weight a pass read although convtap saw no convolution."""
        return [name for name, layer in self._layers.items() if layer.bypasses]

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line per layer.

        Args:
            rows: the maximum number of layers to print, the first and the last; None for all. Layers that were not captured are
                printed in addition.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        layers = list(self._layers.values())
        missing = [place for place, layer in enumerate(layers) if layer.state != "captured"]
        found = Rows(layers, lambda layer: (layer.name, str(layer)))
        whole = "print(acts.coverage.summary(rows=None))"
        return Table(("layer", "state"), found, counts_line(self), self.notes, most=rows, marked=missing, whole=whole)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def counts_line(coverage: Coverage) -> str:
    """Returns the number of layers in each state, as one line."""
    named = ((state, coverage._in_state(state)) for state in _STATES)
    counts = [f"{len(names)} {state}" for state, names in named if names]
    return f"{plural(len(coverage), 'layer')}: " + (", ".join(counts) or "none selected")
