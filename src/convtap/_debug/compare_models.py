"""Two models on one example, compared while both run: each stops at a layer until the other has come to its partner."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from convtap._debug.comparison import OUTPUT, Comparison, Ledger
from convtap._debug.metrics import Tolerance
from convtap._debug.pairs import Flow, folded, match, observe, signature
from convtap._debug.stream import Stream
from convtap._errors import Unsupported, listed
from convtap._example import arguments, fitted, looking, own_tensors, run_once
from convtap._parts import no_part
from convtap._select import FUNCTION, Selection, check_arguments, select
from convtap._structure import MISSING, part_of
from convtap._tapped import tapped

_EIGHT_BITS = 2.0**-8

# Note: [Compiled sides]
# Assumption: hooks that are put on a compiled model are not in its code, and run eagerly it is not what was asked about.
# Choice: a compiled side is the same compiler (its backend, mode and options) on ``tapped(model)``, whose taps are traced
#   with the model. Taps can change what is fused, so the outputs of the model itself are compared as well, and where that
#   compiler did not compile anything, or may not, it is an error.


class _Side:
    """One of the two models: its layers, how it runs, and its calls one by one."""

    def __init__(self, label: str, model: nn.Module, layers: Any, types: tuple[type[nn.Module], ...], example: Any):
        self.label = label
        self.model = model
        self.python = _python_model(label, model)
        self.types = types
        self.example = fitted(example, self.python)
        self.selection: Selection = select(self.python, layers, types)
        self.flow: Flow = observe(self.python, list(self.selection.modules), self.selection.tree, self.example)
        ran = set(self.flow.ran)
        #: the layers that ran, with what must be equal for two structures to match
        self.layers = {name: signature(m) for name, m in self.selection.modules.items() if name in ran}
        self.output: Any = None

    def candidates(self, mapped: Any, layers: Iterable[str]) -> dict[str, Any]:
        """The layers, and modules of other types that are asked for by name."""
        extra = [*(mapped if isinstance(mapped, Iterable) else ()), *layers]
        tree = self.selection.tree
        found = {name: signature(tree.names[name]) for name in extra if name in tree.names and name not in self.layers}
        return {**self.layers, **found}

    @property
    def is_compiled(self) -> bool:
        return self.python is not self.model

    def calls(self, layers: Any, modules: list[str], stack: ExitStack) -> Iterator[tuple[str, int, Any]]:
        """Runs the model, and yields each call as name, index and output."""
        if self.is_compiled:
            yield from self._compiled_calls(modules)
            return
        stream = Stream(self.python, layers, self.types, self.example)
        stack.callback(stream.close)
        for call in stream:
            yield call.name, call.index, call.output
        self.output = stream.output

    def _compiled_calls(self, modules: list[str]) -> Iterator[tuple[str, int, Any]]:
        # held whole: a compiled graph gives all of its outputs at once
        if not modules:
            return
        outputs = self._run_compiled(modules)
        for key in list(outputs):
            stem, mark, number = key.rpartition("#")
            repeated = mark and key not in self.flow.kinds
            yield (stem.rstrip("#"), int(number), outputs.pop(key)) if repeated else (key, 0, outputs.pop(key))

    def _run_compiled(self, modules: list[str]) -> dict[str, Any]:
        import torch._dynamo as dynamo

        if dynamo.eval_frame._stance.stance != "default":
            raise Unsupported(
                f"side {self.label} is compiled, and compiled models run eagerly now (inside a capture's block, or under "
                "torch.compiler.set_stance), so this would compare something else. Call compare outside of that."
            )
        args, kwargs = arguments(own_tensors(self.example))
        before = dynamo.utils.counters["frames"]["ok"]
        with looking(self.python), tapped(self.python, modules, types=self.types) as taps:
            taps.eval()
            _, outputs = self.model.dynamo_ctx(taps)(*args, **kwargs)  # type: ignore[operator]
        if dynamo.utils.counters["frames"]["ok"] == before:
            raise Unsupported(
                f"side {self.label} is compiled, but its compiler compiled nothing of it with taps, so it would have run "
                "eagerly. Compare the model that it was made from, or compile it with fullgraph=True to see why."
            )
        self.output = run_once(self.model, self.example)
        found: dict[str, Any] = dict(outputs)
        return found

    def floor(self, name: str) -> float:
        """The step of a layer with weights of eight bits, whatever type it returns."""
        module = self.selection.tree.names.get(name)
        return _EIGHT_BITS if module is not None and ".quantized" in type(module).__module__ else 0.0


def compare_models(
    a: nn.Module, b: nn.Module, example: Any, map: Any, layers: Any, types: Any, tolerance: Tolerance
) -> Comparison:
    """Compares two models; see ``compare``."""
    kinds = check_arguments(a, layers, types)
    check_arguments(b, None, types)
    with ExitStack() as stack:
        stack.enter_context(looking(a))
        stack.enter_context(looking(b))
        one = _Side("a", a, layers, kinds, example)
        two = _Side("b", b, None, kinds, example)
        pairs, note = match(
            one.candidates(map, ()), two.candidates(map.values() if isinstance(map, dict) else (), one.layers), map
        )
        plan = _Plan(one, two, pairs)
        ledger = Ledger(plan.pairs, tolerance)
        _run(plan, ledger, layers, stack)
        for side in (one, two):
            if side.output is None:
                side.output = run_once(side.model, side.example)
        ledger.compare(OUTPUT, OUTPUT, 0, one.output, two.output)
    compiled = [side.label for side in (one, two) if side.is_compiled]
    notes = [note, f"compiled: {listed(compiled)}; {OUTPUT} is of the runs without taps" if compiled else ""]
    return ledger.close(notes)


class _Plan:
    """Which modules are compared, after fused ones were given the last module that they replace as their partner."""

    def __init__(self, one: _Side, two: _Side, pairs: dict[str, str]) -> None:
        self.sides = (one, two)
        self.pairs: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.inside: tuple[set[str], set[str]] = (set(), set())
        for mine, theirs in pairs.items():
            left = folded(mine, one.flow, theirs, two.flow)
            right = folded(theirs, two.flow, mine, one.flow)
            self.pairs[left] = right
            if left != mine:
                self.inside[0].add(mine)
                self.notes[left] = f"b fuses {mine} … {left}"
            if right != theirs:
                self.inside[1].add(theirs)
                self.notes[left] = f"a fuses {theirs} … {right}"
        for inside, side, partners in zip(self.inside, self.sides, (self.pairs, self.pairs.values()), strict=True):
            inside.update(name for name in side.layers if any(name.startswith(f"{outer}.") for outer in partners))

    def taps(self, side: int, layers: Any) -> Any:
        """What to capture on one side: the layers asked for, every other that might have a partner, and the partners."""
        known = self.sides[side].layers
        extra = [name for name in (self.pairs, self.pairs.values())[side] if name not in known]
        if side == 0 and layers is not None:
            return [*known, *self.sides[0].selection.function_names, *extra] or layers
        if side == 1 and layers is not None:
            return [*self.pairs.values(), *self.sides[0].selection.function_names] or None
        return [*extra, re.compile(".*", re.DOTALL)] if extra else None

    def modules(self, side: int) -> list[str]:
        """The modules that a compiled side is tapped at."""
        known = self.sides[side].layers
        extra = [name for name in (self.pairs, self.pairs.values())[side] if name not in known]
        return [*(name for name in known if name not in self.inside[side]), *extra]


def _run(plan: _Plan, ledger: Ledger, layers: Any, stack: ExitStack) -> None:
    """Lets ``a`` lead, and ``b`` run until it has come to the partner; what ``b`` passes on the way waits."""
    one, two = plan.sides
    theirs = two.calls(plan.taps(1, layers), plan.modules(1), stack)
    if two.is_compiled:
        theirs = iter(list(theirs))  # before the other side opens a block, in which nothing runs compiled
    waiting: dict[tuple[str, int], Any] = {}
    wanted = set(plan.pairs.values())
    unpaired = {name for name in two.layers if name not in wanted}
    for name, index, output in one.calls(plan.taps(0, layers), plan.modules(0), stack):
        if name in plan.inside[0]:
            continue
        partner = plan.pairs.get(name) or _same_name(name, two, wanted)
        found = None if partner is None else _find((partner, index), waiting, theirs, unpaired)
        if found is None or partner is None:
            ledger.lone(0, name, index)
            continue
        floor = max(one.floor(name), two.floor(partner))
        for part in one.selection.parts.get(name, ("",)):
            mine, other = _part(one, name, part, output), part_of(found[0], part)
            ledger.parts.update({name + part: part, partner + part: part})
            ledger.compare(name + part, partner + part, index, mine, other, plan.notes.get(name, ""), floor)
    for name, index in [*waiting, *((name, index) for name, index, _ in theirs)]:
        if name not in plan.inside[1]:
            ledger.lone(1, name, index)


def _part(side: _Side, name: str, part: str, output: Any) -> Any:
    """The part of an output that is to be compared; an error if it was asked for by name and is not there."""
    found = part_of(output, part)
    if found is MISSING and name + part in side.selection.exact:
        raise no_part(name, part, output)
    return found


def _find(
    key: tuple[str, int], waiting: dict[tuple[str, int], Any], calls: Iterable[Any], unpaired: set[str]
) -> tuple[Any] | None:
    """Returns the output of a call (in a tuple), after running on to it; None if it does not come."""
    if key in waiting:
        return (waiting.pop(key),)
    for name, index, output in calls:
        if (name, index) == key:
            return (output,)
        waiting[name, index] = None if name in unpaired else output
    return None


def _same_name(name: str, other: _Side, wanted: set[str]) -> str | None:
    """The partner of a convolution that ran as a function: its weight's owner in the other model, if it has one."""
    tree = other.selection.tree
    if name in wanted or not (
        name == FUNCTION or name in tree.names or any(name == own for own, _ in tree.parameters())
    ):
        return None
    return name


def _python_model(label: str, model: nn.Module) -> nn.Module:
    """Returns the model that a compiled one was made from, or the model itself."""
    inner = getattr(model, "_orig_mod", None) if type(model).__name__ == "OptimizedModule" else None
    found = model if inner is None else inner
    parts = [
        name or "the model"
        for name, module in found.named_modules()
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
    ]
    if parts:
        raise Unsupported(
            f"in side {label} parts are compiled by themselves: {listed(parts)}. They would have to run eagerly to be seen. "
            "Compile the whole model with torch.compile(model), or compare the model before it was compiled."
        )
    if isinstance(found, torch.jit.ScriptModule):
        raise Unsupported(
            f"side {label} is TorchScript, whose layers call no hooks. Capture both sides and compare the captures: "
            "with capture(model) as acts: model(x)."
        )
    return found
