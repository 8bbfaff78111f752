"""Compares two models on one example while both run.

For each call of ``a``, ``b`` runs until it reaches the partner of that call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from convtap._debug.comparison import OUTPUT, Comparison, Ledger, Run
from convtap._debug.metrics import Tolerance
from convtap._debug.pairs import match
from convtap._debug.plan import Plan
from convtap._debug.side import Side
from convtap._errors import LayerNotFound, Unsupported, listed
from convtap._select.arguments import check_arguments
from convtap._select.example import looking
from convtap._select.module_tree import is_keras
from convtap._select.parts import no_part
from convtap._tensors.nested import MISSING, part_of


def compare_models(
    a: nn.Module, b: nn.Module, example: Any, map: Any, layers: Any, types: Any, tolerance: Tolerance, mode: str | None
) -> Comparison:
    """Compares two models. See ``compare``."""
    kinds = check_arguments(a, layers, types)
    check_arguments(b, None, types)
    modes = _modes_text({"a": a, "b": b}, mode)
    with ExitStack() as stack:
        stack.enter_context(looking(a, mode))
        stack.enter_context(looking(b, mode))
        sides = one, two = Side("a", a, layers, kinds, example, mode), Side("b", b, None, kinds, example, mode)
        mapped = map if isinstance(map, dict) else {}
        pairs, note = match(one.candidates(mapped), two.candidates(mapped.values(), one.layers), map)
        plan = Plan(one, two, pairs)
        ledger = Ledger(tolerance)
        _run(one, two, plan, ledger, layers, stack)
        for number, side in enumerate(sides):
            if not (ledger.saw(number) or side.selection.modules):
                raise LayerNotFound(f"side {side.label}: {side.selection.nothing()}")
            side.run_alone()
        ledger.compare(Run(OUTPUT), Run(OUTPUT), one.output, two.output)
    compiled = [side.label for side in sides if side.is_compiled]
    return ledger.close(
        [note, modes, f"compiled: {listed(compiled)} ({OUTPUT} is of the runs without taps)" if compiled else ""]
    )


def _modes_text(sides: dict[str, nn.Module], mode: str | None) -> str:
    """Describes the modes of both runs, if a model was or ran in train mode."""
    keras = [label for label, model in sides.items() if is_keras(type(model))]
    if keras and mode == "train":
        raise Unsupported(
            f"mode='train' does not work for side {keras[0]}, a Keras model, whose calls choose the mode. Remove mode= and "
            "pass it in the example: example={'inputs': x, 'training': True}."
        )
    training = [
        label
        for label, model in sides.items()
        if label not in keras
        and any(getattr(module, "training", False) for module in model.modules() if not is_keras(type(module)))
    ]
    if mode == "train":
        return "both ran in train mode"
    if not training:
        return ""
    if mode is None:
        each = (f"{label} in {'train' if label in training else 'eval'} mode" for label in sides)
        return f"each ran in its own mode: {', '.join(each)}"
    which = [label if sides[label].training else f"parts of {label}" for label in training]
    were = "was" if which in (["a"], ["b"]) else "were"
    return (
        f"both ran in eval mode, but {' and '.join(which)} {were} in train mode. Pass mode='train' to compare both in train "
        "mode, or mode=None to compare them as they are"
    )


def _run(one: Side, two: Side, plan: Plan, ledger: Ledger, layers: Any, stack: ExitStack) -> None:
    calls = two.calls(plan.taps(1, layers), plan.modules(1), stack)
    if two.is_compiled:
        calls = iter(list(calls))  # before the other side's capture opens, inside which compiled code runs eagerly
    waiting: dict[Run, Any] = {}
    unpaired = two.layers.keys() - plan.partners(1)
    for run, output in one.calls(plan.taps(0, layers), plan.modules(0), stack):
        if plan.passes_by(0, run):
            continue
        partner = plan.partner(run)
        found = None if partner is None else _find(partner, waiting, calls, unpaired)
        if partner is not None and found is not None:
            floor = max(one.floor(run.layer), two.floor(partner.layer))
            for part in one.selection.parts.get(run.layer, ("",)):
                mine, theirs = run._replace(part=part), partner._replace(part=part)
                x, y = part_of(output, part), part_of(found[0], part)
                if x is MISSING and mine.name in one.selection.exact:
                    raise no_part(run.layer, part, output)
                ledger.compare(mine, theirs, x, y, note=plan.notes.get(run, ""), floor=floor)
        else:
            _note_lone(ledger, plan, 0, run)
    for run in [*waiting, *(run for run, _ in calls)]:
        if not plan.passes_by(1, run):
            _note_lone(ledger, plan, 1, run)


def _note_lone(ledger: Ledger, plan: Plan, side: int, run: Run) -> None:
    if run.layer in plan.only_partners[side]:
        ledger.skip(side, run.layer)
    else:
        ledger.lone(side, run)


def _find(
    wanted: Run, waiting: dict[Run, Any], calls: Iterator[tuple[Run, Any]], unpaired: Collection[str]
) -> tuple[Any] | None:
    """Runs up to a call. Returns its output in a tuple, or None if it does not run."""
    if wanted in waiting:
        return (waiting.pop(wanted),)
    for run, output in calls:
        if run == wanted:
            return (output,)
        waiting[run] = None if run.layer in unpaired else output
    return None
