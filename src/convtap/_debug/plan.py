"""Which runs of two models are compared: the layers' by name, and fused ones with the last module that they replace."""

from __future__ import annotations

import re
from typing import Any

from convtap._debug.comparison import Run
from convtap._debug.pairs import folded
from convtap._debug.side import Side
from convtap._select.module_tree import lies_in
from convtap._select.selection import FUNCTION


class Plan:
    """Which runs are compared, after fused layers were given the last module that they replace as their partner.

    Attributes:
        pairs: the layers' partners by name.
        runs: the partners of single runs, where flows are known: they come before ``pairs``.
        notes: what to say of a run of ``a``.
        inside: on each side, the runs that are part of a fused one.
        only_partners: on each side, the modules that are there as partners, and not compared themselves.
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
        """Whether a run is not to be compared by itself."""
        return run in self.inside[side] or run.layer in self._within[side]

    def partner(self, run: Run) -> Run | None:
        """The run of ``b`` to compare a run of ``a`` with."""
        if run in self.runs:
            return self.runs[run]
        if run.layer in self.only_partners[0]:
            return None
        partner = self.pairs.get(run.layer) or _same_name(run.layer, self.sides[1], self.partners(1))
        return None if partner is None else Run(partner, run.number)

    def partners(self, side: int) -> set[str]:
        """The names of the modules on one side that are compared."""
        return self._partners[side]

    def _extra(self, side: int) -> list[str]:
        wanted = self.partners(side).difference(self.sides[side].layers)
        return [name for name in self.sides[side].selection.tree.names if name in wanted]

    def taps(self, side: int, layers: Any) -> Any:
        """What to capture on one side: the layers asked for, every other that might have a partner, and the partners."""
        known = self.sides[side].layers
        extra = self._extra(side)
        functions = self.sides[0].selection.function_names
        if side == 0 and layers is not None:
            return [*known, *functions, *extra] or layers
        if side == 1 and layers is not None:
            return [*dict.fromkeys([*self.pairs.values(), *extra]), *functions] or None
        return [*extra, re.compile(".*", re.DOTALL)] if extra else None

    def modules(self, side: int) -> list[str]:
        """The modules that a compiled side is tapped at."""
        fused = {run.layer for run in self.inside[side]} | self._within[side]
        return [*(name for name in self.sides[side].layers if name not in fused), *self._extra(side)]


def _same_name(name: str, other: Side, wanted: set[str]) -> str | None:
    """The partner of a convolution that ran as a function: its weight's owner in the other model, if it has one."""
    known = name == FUNCTION or name in other.selection.tree.names or other.selection.has_parameter(name)
    return name if known and name not in wanted else None
