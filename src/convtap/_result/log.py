"""The log of a capture, which the recorder writes and the views read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from convtap._result.call import Call, LayerRecord, record_of, separate
from convtap._result.coverage import LayerCoverage
from convtap._result.keys import stems
from convtap._result.origin import Origin
from convtap._result.runs import Runs
from convtap._select.module_tree import resolve_name

_Made = TypeVar("_Made")


class _Either(Container[str]):
    """The union of two collections of names."""

    def __init__(self, one: Container[str], other: Container[str]) -> None:
        self._one, self._other = one, other

    def __contains__(self, name: object) -> bool:
        return name in self._one or name in self._other


@dataclass
class Log:
    """The recorded calls of a capture, and the counts of its layers.

    Attributes:
        calls: the kept calls in execution order, by a serial number, or by the layer's name if only its last call is kept.
        selected: the names of the selected layers, in definition order. It is a mapping, for fast lookups.
        exact: the layers that were selected by their exact names.
        records: the record of each layer that was captured or bypassed, by name.
        inputs: for each forward pass, the shape of its first input tensor, or None.
        unclear: for some forward passes, why their rows may not be the inputs, and the pass that they may belong to.
        aliases: prefixes of names, each with the prefix that replaces it.
        notes: lines that the views show.
        origin: the model, its mode, the versions and the date; None if version 0.1.0 wrote the file or the pickle.
        lacking: parts that a glob selected but that some layer's output did not have.
        cleared: how often ``clear`` was called.
        is_open: whether the capture may still record.
    """

    calls: dict[Any, Call] = field(default_factory=dict)
    selected: Mapping[str, Any] = field(default_factory=dict)
    exact: Collection[str] = ()
    records: dict[str, LayerRecord] = field(default_factory=dict)
    inputs: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    unclear: dict[int, tuple[str, int]] = field(default_factory=dict)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: Origin | None = None
    lacking: dict[str, None] = field(default_factory=dict)
    cleared: int = 0
    is_open: bool = False
    _stems: set[str] | None = field(default=None, init=False, repr=False)
    _runs: Runs = field(default_factory=Runs, init=False, repr=False)
    _made: dict[Any, tuple[int, Any]] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # in an open capture, the names are the keys of a dict of modules
        own = {"selected": tuple(self.selected), "exact": tuple(self.exact), "is_open": False}
        return {**self.__dict__, **own, "_runs": Runs(), "_made": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {key: value for key, value in state.items() if key not in ("changes", "_indexed")}  # from version 0.1.0
        self.__dict__.update({"is_open": False, "_runs": Runs(), "_made": {}, "_stems": None, **state})
        self.selected = dict.fromkeys(state.get("selected", ()))

    def _forget(self) -> None:
        """Discards cached results, since calls were removed or replaced."""
        self._made.clear()
        self._runs.forget()

    def clear(self) -> None:
        """Removes all calls. The counts of captured calls stay."""
        self.calls.clear()
        self.inputs.clear()
        self.unclear.clear()
        if self.origin is not None:
            self.origin.forget_passes()
        for record in self.records.values():
            record.held = 0
            record.cleared = record.captured
        self.cleared += 1
        self._forget()

    def replace(self, name: str, call: Call) -> None:
        """Replaces the earlier call of a layer."""
        self.calls.pop(name, None)
        self.calls[name] = call
        record_of(call).held = 1
        self.trim()

    def withdraw(self, name: str) -> Call | None:
        """Removes the newest call of a layer and returns it, or None."""
        try:
            key = next((key for key, call in reversed(self.calls.items()) if call.name == name), None)
        except RuntimeError:  # another thread has appended meanwhile
            return self.withdraw(name)
        if key is None:
            return None
        call = self.calls.pop(key)
        record = record_of(call)
        record.held -= 1
        record.captured -= 1
        self._forget()
        return call

    def trim(self) -> None:
        """Removes the inputs of passes without calls, except those of the newest pass."""
        if len(self.inputs) > 2 * len(self.calls) + 16:
            needed = {call.forward for call in self.calls.values()} | {max(self.inputs)}
            for number in [number for number in self.inputs if number not in needed]:
                del self.inputs[number]
                self.unclear.pop(number, None)

    def names(self) -> dict[str, None]:
        """Returns the names of the selected layers, then of other captured layers."""
        return dict.fromkeys((*self.selected, *self.records))

    def resolve(self, name: str) -> str | None:
        """Returns the layer that a name stands for, or None."""
        return resolve_name(name, _Either(self.selected, self.records), self.aliases)

    def runs(self, name: str) -> list[Call]:
        """Returns the kept calls of a layer, in execution order."""
        last: Call | None = self.calls.get(name)
        return [last] if last is not None else self._runs.of(name, self.calls)

    def numbered(self) -> list[Call]:
        """Returns the calls in execution order, each with its number."""
        calls = list(self.calls.values())
        if not isinstance(next(iter(self.calls), None), str):
            self._runs.update(self.calls)
        return calls

    def index(self) -> dict[str, Call]:
        """Returns the calls by key, in execution order."""
        return {call.key: call for call in self.numbered()}

    def made(self, make: Callable[[Log], _Made]) -> _Made:
        """Returns the result of a function of the log, cached after the capture closes."""
        count, found = self._made.get(make, (-1, None))
        if count == len(self.calls) and not self.is_open:
            known: _Made = found
            return known
        new = make(self)
        if not self.is_open:
            self._made[make] = (len(self.calls), new)
        return new

    def by_pass(self) -> dict[int, list[Call]]:
        """Returns the calls of each forward pass."""
        return self.made(_by_pass)

    def tell_apart(self, newest: LayerRecord | None = None) -> None:
        """Sets the separators so that no call's key is also another layer's key.

        Args:
            newest: the only new record since the last call; None if any record may be new.
        """
        if newest is None or self._stems is None:
            self._stems = stems(self.names())
            separate(self.records.values(), self._stems)
            return
        added = stems([newest.name]) - self._stems
        self._stems |= added
        separate([newest] if not added else self.records.values(), self._stems)

    def count_bypasses(self) -> None:
        """Counts a bypass for each read of a weight that no convolution followed."""
        for record in self.records.values():
            if record.pending is not None:
                record.count_bypass()

    def states(self) -> list[LayerCoverage]:
        """Returns the coverage of each layer."""
        return [self.state(name) for name in self.names()]

    def state(self, name: str) -> LayerCoverage:
        """Returns the coverage of one layer."""
        record = self.records.get(name)
        if record is None:
            return LayerCoverage(name, 0)
        unactivated = max(0, record.ran - record.captured)
        return LayerCoverage(name, record.captured, record.bypassed, record.bypasses, record.computed, unactivated)


def _by_pass(log: Log) -> dict[int, list[Call]]:
    found: dict[int, list[Call]] = {}
    for call in list(log.calls.values()):
        found.setdefault(call.forward, []).append(call)
    return found
