"""Compares two captures, call by call."""

from __future__ import annotations

from typing import Any

from convtap._debug.comparison import Comparison, Ledger, Run
from convtap._debug.metrics import Tolerance
from convtap._debug.pairs import match
from convtap._result.activations import Activations
from convtap._tensors.nested import MISSING, part_of
from convtap._tensors.statistics import shapes


def compare_captures(a: Activations, b: Activations, map: Any, tolerance: Tolerance) -> Comparison:
    """Compares two captures; see ``compare``."""
    ours, theirs = _outputs(a, b), _outputs(b, a)
    pairs, note = match(_structure(ours), _structure(theirs), map)
    partners = {(run.name, run.number): run for run in theirs}
    ledger = Ledger(tolerance)
    for run, output in ours.items():
        partner = partners.pop((pairs.get(run.name, ""), run.number), None)
        if partner is None:
            ledger.lone(0, run)
        else:
            ledger.compare(run, partner, output, theirs[partner])
    for partner in partners.values():
        ledger.lone(1, partner)
    return ledger.close([note])


def _outputs(acts: Activations, other: Activations) -> dict[Run, Any]:
    """Returns the output of each call; of an output that the other side has in part, the same parts."""
    parts: dict[str, dict[str, None]] = {}
    for call in other.calls():
        if call.part:
            parts.setdefault(call.layer, {})[call.part] = None
    found = {}
    for call in acts.calls():
        for part in ("",) if call.part else parts.get(call.layer, ("",)):
            output = part_of(call.output, part)
            if output is not MISSING:
                found[Run(call.layer, call.index, call.part + part)] = output
    return found


def _structure(outputs: dict[Run, Any]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for run, output in outputs.items():
        found.setdefault(run.name, []).append(shapes(output))
    return found
