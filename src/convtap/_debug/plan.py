"""Plans which runs of two models are compared."""

from __future__ import annotations

import re
from typing import Any

from convtap._debug.comparison import Run
from convtap._debug.pairs import folded
from convtap._debug.side import Side
from convtap._select.module_tree import lies_in
from convtap._select.selection import FUNCTION


class Plan:
    """The runs to compare.

    The partner of a fused layer is the last module that it replaces.

    Attributes:
        pairs: the layers' partners, by name.
        runs: the partners of single runs, if flows are known. They take precedence over ``pairs``.
        notes: the remarks on runs of ``a``.
        inside: on each side, the runs that are part of a fused one.
        only_partners: on each side, the modules that serve only as partners.
    """

    def __init__(self, one: Side, two: Side, pairs: dict[str, str]) -> None:
        self.sides = (one, two)
        self.pairs = dict(pairs)
        self.runs: dict[Run, Run] = {}
        self.notes: dict[Run, str] = {}
        self.inside: tuple[set[Run], set[Run]] = (set(), set())
        for name, partner in pairs.items():
            times = one.flow.counts.get(name, 0)
            for number in range(min(times, two.flow.counts.get(partner, times))):
                self._pair(Run(name, number), Run(partner, number))
        self.only_partners: list[set[str]] = []
        self._within: list[set[str]] = []
        for side, runs, asked in ((one, self.runs, pairs.keys()), (two, self.runs.values(), pairs.values())):
            names = {run.layer for run in runs}
            self.only_partners.append(names - side.layers.keys() - set(asked))
            self._within.append({name for name in side.layers if lies_in(name, names)})
        self._partners = (
            {*self.pairs, *(run.layer for run in self.runs)},
            {*self.pairs.values(), *(run.layer for run in self.runs.values())},
        )

    def _pair(self, mine: Run, theirs: Run) -> None:
        one, two = self.sides
        left = folded(mine, one.flow, theirs, two.flow)
        right = folded(theirs, two.flow, mine, one.flow)
        self.runs[left] = right
        if left != mine:
            self.inside[0].add(mine)
            self.notes[left] = f"b fuses {mine.layer} … {left.layer}"
        if right != theirs:
            self.inside[1].add(theirs)
            self.notes[left] = f"a fuses {theirs.layer} … {right.layer}"

    def passes_by(self, side: int, run: Run) -> bool:
        """Returns whether a run is not compared by itself."""
        return run in self.inside[side] or run.layer in self._within[side]

    def partner(self, run: Run) -> Run | None:
        """Returns the run of ``b`` to compare with a run of ``a``, or None."""
        if run in self.runs:
            return self.runs[run]
        if run.layer in self.only_partners[0]:
            return None
        partner = self.pairs.get(run.layer) or _same_name(run.layer, self.sides[1], self.partners(1))
        return None if partner is None else Run(partner, run.number)

    def partners(self, side: int) -> set[str]:
        """Returns the names of the modules of one side that are compared."""
        return self._partners[side]

    def _extra(self, side: int) -> list[str]:
        wanted = self.partners(side).difference(self.sides[side].layers)
        return [name for name in self.sides[side].selection.tree.names if name in wanted]

    def taps(self, side: int, layers: Any) -> Any:
        """Returns the layers to capture on one side.

        They are the selected layers, all others that may have a partner, and the partners.
        """
        known = self.sides[side].layers
        extra = self._extra(side)
        functions = self.sides[0].selection.function_names
        if side == 0 and layers is not None:
            return [*known, *functions, *extra] or layers
        if side == 1 and layers is not None:
            return [*dict.fromkeys([*self.pairs.values(), *extra]), *functions] or None
        return [*extra, re.compile(".*", re.DOTALL)] if extra else None

    def modules(self, side: int) -> list[str]:
        """Returns the modules to tap on a compiled side."""
        fused = {run.layer for run in self.inside[side]} | self._within[side]
        return [*(name for name in self.sides[side].layers if name not in fused), *self._extra(side)]


def _same_name(name: str, other: Side, wanted: set[str]) -> str | None:
    """Returns the name of a functional convolution if the other model has its weight."""
    known = name == FUNCTION or name in other.selection.tree.names or other.selection.has_parameter(name)
    return name if known and name not in wanted else None
