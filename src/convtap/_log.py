"""The memory of a block: what the recorder writes and every view reads."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from convtap._call import Call, Tally
from convtap._coverage import LayerCoverage


@dataclass
class Log:
    """The memory of a block.

    Attributes:
        calls: what is kept, in execution order.
        selected: the names of the selected layers, in definition order.
        exact: those of them that were asked for by exact name.
        tallies: the account of each layer that was captured or bypassed, by name.
        inputs: by forward pass, the shape of its first input tensor, or None.
        aliases: name prefixes and what they stand for.
        notes: lines for the views.
        changes: grows with every call kept or forgotten.
        cleared: how often the calls were forgotten.
    """

    calls: dict[Any, Call] = field(default_factory=dict)
    selected: Collection[str] = ()
    exact: Collection[str] = ()
    tallies: dict[str, Tally] = field(default_factory=dict)
    inputs: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: int = 0
    cleared: int = 0

    def clear(self) -> None:
        """Forgets the calls, as if the block began here; what was ever captured stays counted."""
        self.calls.clear()
        self.inputs.clear()
        for tally in self.tallies.values():
            tally.held = 0
            tally.numbers = itertools.count()
        self.changes += 1
        self.cleared += 1

    def forget_passes(self) -> None:
        """Forgets the inputs of passes of which no call is kept, so that they do not add up; not of the newest 64."""
        if len(self.inputs) > 2 * len(self.calls) + 256:
            kept = {call.forward for call in self.calls.values()}
            for number in list(self.inputs)[:-64]:  # what runs in another thread may still give outputs
                if number not in kept:
                    self.inputs.pop(number, None)

    def names(self) -> dict[str, None]:
        """Every layer that is known here: the selected ones, then what else was captured."""
        return dict.fromkeys((*self.selected, *self.tallies))

    def settle(self) -> None:
        """Ends the block's accounts: a read of a weight that no convolution followed was a bypass."""
        for tally in self.tallies.values():
            if tally.pending is not None:
                tally.settle()

    def states(self) -> list[LayerCoverage]:
        """What became of each of them."""
        found = []
        for name in self.names():
            tally = self.tallies.get(name)
            if tally is None:
                found.append(LayerCoverage(name, 0))
            else:
                state = (tally.captured, tally.bypassed, tally.bypasses, tally.computed)
                found.append(LayerCoverage(name, *state))
        return found
