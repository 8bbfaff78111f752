"""The memory of a capture: the recorder writes it, and every view reads it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from convtap._result.call import Call, LayerRecord, record_of, separate
from convtap._result.coverage import LayerCoverage
from convtap._result.origin import Origin
from convtap._select.module_tree import resolve_name


@dataclass
class Log:
    """The memory of a block.

    Attributes:
        calls: what is kept, in execution order.
        selected: the names of the selected layers, in definition order.
        exact: those of them that were asked for by exact name.
        records: the account of each layer that was captured or bypassed, by name.
        inputs: by forward pass, the shape of its first input tensor, or None.
        unclear: by forward pass, why its rows may not be the inputs, and the pass that they may belong to.
        aliases: name prefixes and what they stand for.
        notes: lines for the views.
        origin: the model, its mode, the versions and the date; None if version 0.1.0 wrote the file or the pickle.
        lacking: parts that a glob asked for, and that the output of some layer did not have.
        changes: grows with every call kept or forgotten.
        cleared: how often the calls were forgotten.
    """

    calls: dict[Any, Call] = field(default_factory=dict)
    selected: Collection[str] = ()
    exact: Collection[str] = ()
    records: dict[str, LayerRecord] = field(default_factory=dict)
    inputs: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    unclear: dict[int, tuple[str, int]] = field(default_factory=dict)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: Origin | None = None
    lacking: dict[str, None] = field(default_factory=dict)
    changes: int = 0
    cleared: int = 0
    _indexed: tuple[int, dict[str, Call]] = field(default=(-1, {}), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # while the block is open, the names are keys of its modules
        return {**self.__dict__, "selected": tuple(self.selected), "exact": tuple(self.exact), "_indexed": (-1, {})}

    def clear(self) -> None:
        """Forgets the calls, as if the block began here; what was ever captured stays counted."""
        self.calls.clear()
        self.inputs.clear()
        self.unclear.clear()
        if self.origin is not None:
            self.origin.forget_passes()
        for record in self.records.values():
            record.held = 0
            record.cleared = record.captured
        self.changes += 1
        self.cleared += 1

    def replace(self, name: str, call: Call) -> None:
        """Keeps a call in place of the layer's earlier one."""
        self.calls.pop(name, None)
        self.calls[name] = call
        record_of(call).held = 1
        self.trim()
        self.changes += 1

    def withdraw(self, name: str) -> Call | None:
        """Forgets the newest call of a layer, as if it had not been; returns it."""
        newest: list[tuple[Any, Call]] = list(reversed(self.calls.items()))
        for key, call in newest:
            if call.name == name:
                del self.calls[key]
                record = record_of(call)
                record.held -= 1
                record.captured -= 1
                self.changes += 1
                return call
        return None

    def trim(self) -> None:
        """Forgets the inputs of passes that no call is left of; the newest pass may still get some."""
        if len(self.inputs) > 2 * len(self.calls) + 16:
            needed = {call.forward for call in self.calls.values()} | {max(self.inputs)}
            for number in [number for number in self.inputs if number not in needed]:
                del self.inputs[number]
                self.unclear.pop(number, None)

    def names(self) -> dict[str, None]:
        """Every layer that is known here: the selected ones, then what else was captured."""
        return dict.fromkeys((*self.selected, *self.records))

    def resolve(self, name: str) -> str | None:
        """Returns the layer that a name stands for here, or None."""
        return resolve_name(name, self.names(), self.aliases)

    def index(self) -> dict[str, Call]:
        """Returns the calls by key, in execution order."""
        stamp, index = self._indexed
        if stamp != self.changes:
            changes = self.changes
            calls = list(self.calls.values())
            index = {call.key: call for call in calls}
            if len(index) < len(calls):
                self.renumber()
                index = {call.key: call for call in calls}
            self._indexed = (changes, index)
        return index

    def renumber(self) -> None:
        """Numbers the calls of each layer in order: two threads that run a layer at once may have taken one number."""
        counts: dict[str, int] = {}
        for call in list(self.calls.values()):
            call.index = counts.get(call.name, 0)
            counts[call.name] = call.index + 1

    def tell_apart(self) -> None:
        """Sees to it that no numbered call has a key that is also another layer's."""
        separate(self.records.values(), self.names())

    def count_bypasses(self) -> None:
        """Ends the block's accounts: a read of a weight that no convolution followed was a bypass."""
        for record in self.records.values():
            if record.pending is not None:
                record.count_bypass()

    def states(self) -> list[LayerCoverage]:
        """What became of each of them."""
        found = []
        for name in self.names():
            record = self.records.get(name)
            if record is None:
                found.append(LayerCoverage(name, 0))
            else:
                unactivated = max(0, record.ran - record.captured)
                state = (record.captured, record.bypassed, record.bypasses, record.computed, unactivated)
                found.append(LayerCoverage(name, *state))
        return found
