"""Two captures, or two models, side by side: how far apart each layer is, and the first one over a tolerance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from convtap._errors import InvalidType, InvalidValue, listed
from convtap._example import Example
from convtap._metrics import Difference, Tolerance, difference, step
from convtap._pairs import match
from convtap._policy import walk_tensors
from convtap._result import Activations
from convtap._select import CONV1D, Layers, Types
from convtap._stats import shapes
from convtap._table import Table

OUTPUT = "<output>"


class Comparison:
    """What ``compare`` found, in the execution order of ``a``. Print it, iterate over it, or read ``first``.

    Attributes:
        rows: one ``Difference`` for each output that has a partner.
        only_a: the keys of calls of ``a`` that have none.
        only_b: those of ``b``.
        notes: how layers were paired, and what else is to say.
    """

    def __init__(
        self, rows: list[Difference], only_a: list[str], only_b: list[str], tolerance: Tolerance, notes: Iterable[str]
    ) -> None:
        self.rows = rows
        self.only_a = only_a
        self.only_b = only_b
        self.notes = [note for note in notes if note]
        self._tolerance = tolerance

    @property
    def first(self) -> Difference | None:
        """The first row over the tolerance, or None if there is none."""
        return next((row for row in self.rows if row.over), None)

    @property
    def agrees(self) -> bool:
        """Whether no row is over the tolerance, and every call has a partner."""
        return self.first is None and not self.only_a and not self.only_b

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain Python values; infinite ones stay ``float("inf")``."""
        first = self.first
        return {
            "rows": [row.to_dict() for row in self.rows],
            "first": None if first is None else first.name,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "agrees": self.agrees,
            "tolerance": {
                "atol": self._tolerance.atol,
                "rtol": self._tolerance.rtol,
                "sqnr_db": self._tolerance.sqnr_db,
            },
            "notes": list(self.notes),
        }

    def _table(self) -> Table:
        first = self.first
        renamed = any(row.name != row.partner for row in self.rows)
        rows = []
        for row in self.rows:
            mark = "← first over" if row is first else "over" if row.over else ""
            numbers = (row.max_abs, row.relative, row.sqnr_db, row.cosine)
            names = (row.name, row.partner) if renamed else (row.name,)
            rows.append((*names, str(row.shape), *numbers, "; ".join(filter(None, (mark, row.note)))))
        columns = ("a", "b") if renamed else ("layer",)
        title = f"{sum(row.over for row in self.rows)} of {len(self.rows)} over: {self._tolerance.text}"
        notes = [
            f"only in a: {listed(self.only_a)}" if self.only_a else "",
            f"only in b: {listed(self.only_b)}" if self.only_b else "",
            *self.notes,
        ]
        return Table((*columns, "shape", "max abs", "relative", "SQNR dB", "cosine", ""), rows, title, notes)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def compare(
    a: nn.Module | Activations,
    b: nn.Module | Activations,
    *,
    example: Example | None = None,
    map: Mapping[str, str] | None = None,
    layers: Layers = None,
    types: Types = CONV1D,
    atol: float | None = None,
    rtol: float | None = None,
    sqnr_db: float | None = None,
) -> Comparison:
    """Compares two captures, or two models on an example, and marks the first layer over the tolerance.

    Two models run side by side, in eval mode and without gradients, and stop at each layer, so that no more than the outputs
    being compared is held. A compiled model runs compiled, through ``torch.compile(tapped(model))``, which holds all of its
    outputs. The row ``<output>`` compares what the models return when they are run without taps. ``a`` is the reference.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import compare
        >>> _ = torch.manual_seed(0)
        >>> a = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 3)).eval()
        >>> b = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 3)).eval()
        >>> _ = b.load_state_dict(a.state_dict())
        >>> compare(a, b, example=torch.randn(1, 1, 50)).first is None
        True
        >>> b[2].bias.data += 0.5
        >>> compare(a, b, example=torch.randn(1, 1, 50)).first.name
        '2'

    Args:
        a: the reference: a model, or what a block captured (``load(path)`` too).
        b: what to compare with it, of the same kind.
        example: with models: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Floating tensors in
            it are given to each model in its own type and on its own device.
        map: names in ``a`` to names in ``b``, for layers whose names differ. Layers that it leaves out are paired by name,
            or by order where the names differ and the structures match.
        layers: with models: which layers of ``a`` to compare, as in ``capture``.
        types: with models: the module types to choose from.
        atol: every element must have |a − b| ≤ atol + rtol · |a|.
        rtol: see ``atol``; one is 0 if only the other is given.
        sqnr_db: the least signal to quantization noise ratio of a layer. With none of the three, a layer's relative error
            ‖a − b‖ / ‖a‖ must be at most √ε of the coarsest type so far: 3.5e-4 for float32, 0.09 for bfloat16, 0.06 for
            eight bits.

    Raises:
        InvalidType: the sides are not of one kind.
        InvalidValue: models without an example, or no layer has a partner.
        LayerNotFound: ``map`` or ``layers`` names a layer that is not there.
        Unsupported: a compiled side cannot run compiled here.
    """
    tolerance = Tolerance(*(_tolerance(name, v) for name, v in (("atol", atol), ("rtol", rtol), ("sqnr_db", sqnr_db))))
    if isinstance(a, Activations) and isinstance(b, Activations):
        return _compare_captures(a, b, map, tolerance)
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        if example is None:
            raise InvalidValue("two models are compared on an example. Write: compare(a, b, example=x)")
        from convtap._compare_models import compare_models

        return compare_models(a, b, example, map, layers, types, tolerance)
    raise InvalidType(
        f"compare takes two models or two captures, and got {type(a).__name__} and {type(b).__name__}. Capture both first "
        "(with capture(model) as acts: model(x)), load both from files (load(path)), or pass both models with an example."
    )


def _compare_captures(a: Activations, b: Activations, map: Any, tolerance: Tolerance) -> Comparison:
    pairs, note = match(_structure(a), _structure(b), map)
    ledger = Ledger(pairs, tolerance)
    theirs = {(call.name, call.index): call for call in b.calls()}
    for call in a.calls():
        partner = theirs.pop((pairs.get(call.name, ""), call.index), None)
        if partner is None:
            ledger.lone(0, call.name, call.index)
        else:
            ledger.compare(call.name, partner.name, call.index, call.output, partner.output)
    for name, index in theirs:
        ledger.lone(1, name, index)
    return ledger.close([note], a, b)


def _structure(acts: Activations) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for call in acts.calls():
        found.setdefault(call.name, []).append(shapes(call.output))
    return found


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name} is a {type(value).__name__}, and it must be a number: {name}=1e-3.")
    if not (name == "sqnr_db" or value >= 0) or value != value:
        raise InvalidValue(f"{name}={value} is no tolerance: it must be at least 0.")
    return float(value)


@dataclass
class _Row:
    """A difference before it is known how often each layer runs, on which its key depends."""

    name: str
    partner: str
    index: int
    path: str
    found: Difference


class Ledger:
    """Collects the rows of a comparison while it goes on."""

    def __init__(self, pairs: Mapping[str, str], tolerance: Tolerance) -> None:
        self._pairs = pairs
        self._tolerance = tolerance
        self._rows: list[_Row] = []
        self._lone: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
        self._counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._coarsest = 0.0

    def lone(self, side: int, name: str, index: int) -> None:
        """Notes a call without a partner, on side 0 (``a``) or 1 (``b``)."""
        self._counts[side][name] += 1
        self._lone[side].append((name, index))

    def compare(self, name: str, partner: str, index: int, a: Any, b: Any, note: str = "", floor: float = 0.0) -> None:
        """Compares two outputs, tensor by tensor.

        Args:
            floor: the step of a layer that computes more coarsely than the type of its output says.
        """
        self._counts[0][name] += 1
        self._counts[1][partner] += 1
        left, right = dict(walk_tensors(a)), dict(walk_tensors(b))
        for path in [path for path in left if path in right]:
            x, y = left[path], right[path]
            self._coarsest = max(self._coarsest, step(x), step(y), floor)
            found = difference(name, partner, x, y, self._tolerance, self._coarsest)
            found = replace(found, note="; ".join(filter(None, (found.note, note))))
            self._rows.append(_Row(name, partner, index, path, found))
        for side, mine, other in ((0, left, right), (1, right, left)):
            for path in [path for path in mine if path not in other]:
                self._lone[side].append((f"{(name, partner)[side]}.{path}" if path else (name, partner)[side], index))

    def close(self, notes: list[str], a: Any, b: Any) -> Comparison:
        """Ends the comparison.

        Raises:
            InvalidValue: there is nothing in it.
        """
        lone = [[self._key(side, name, index) for name, index in self._lone[side]] for side in (0, 1)]
        if not any(row.name != OUTPUT for row in self._rows):
            raise InvalidValue(
                f"no layer of a has a partner in b. a ran {listed(lone[0])}; b ran {listed(lone[1])}. Say which belong "
                "together with map={name in a: name in b}."
            )
        rows = [
            replace(
                row.found,
                name=self._key(0, row.name, row.index, row.path),
                partner=self._key(1, row.partner, row.index, row.path),
            )
            for row in self._rows
        ]
        return Comparison(rows, lone[0], lone[1], self._tolerance, notes)

    def _key(self, side: int, name: str, index: int, path: str = "") -> str:
        key = f"{name}#{index}" if self._counts[side][name] > 1 else name
        return f"{key}.{path}" if path else key


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a structure."""
    return [tensor for _, tensor in walk_tensors(value)]
