"""Compares captures, or a capture with arrays, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convtap._debug.comparison import Comparison, Ledger
from convtap._debug.metrics import Tolerance
from convtap._debug.outputs import Output, joined, outputs_of, several_per_pass
from convtap._debug.pairs import match
from convtap._errors import listed
from convtap._result.activations import Activations
from convtap._tensors.statistics import shapes


def compare_captures(
    a: Activations | Mapping[str, Any], b: Activations | Mapping[str, Any], map: Any, tolerance: Tolerance, calls: str
) -> Comparison:
    """Compares two captures, or a capture with arrays. See ``compare``."""
    ours, theirs, notes = outputs_of(a, b), outputs_of(b, a), []
    if calls == "cat":
        several = several_per_pass(ours) | several_per_pass(theirs)
        (ours, ours_timeless), (theirs, theirs_timeless) = joined(ours, several), joined(theirs, several)
        timeless = dict.fromkeys([*ours_timeless, *theirs_timeless])
        notes = [f"of the last call, without a time axis to join: {listed(timeless)}"] if timeless else []
    pairs, note = match(_structure(ours), _structure(theirs), map)
    partners = {(output.run.name, output.run.number): output for output in theirs}
    ledger = Ledger(tolerance)
    for output in ours:
        partner = partners.pop((pairs.get(output.run.name, ""), output.run.number), None)
        if partner is None:
            ledger.lone(0, output.run)
        else:
            ledger.compare(output.run, partner.run, output.value, partner.value)
    for partner in partners.values():
        ledger.lone(1, partner.run)
    return ledger.close([note, *notes])


def _structure(outputs: list[Output]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for output in outputs:
        found.setdefault(output.run.name, []).append(shapes(output.value))
    return found
