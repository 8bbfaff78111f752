"""Two models on one example, compared while both run: each stops at a layer until the other has come to its partner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from convtap._capture.tapped import tapped
from convtap._debug.comparison import OUTPUT, Comparison, Ledger
from convtap._debug.metrics import Tolerance
from convtap._debug.pairs import Flow, Run, match, observe, signature
from convtap._debug.plan import Plan
from convtap._debug.stream import Stream
from convtap._errors import LayerNotFound, Unsupported, listed
from convtap._select.arguments import check_arguments
from convtap._select.example import arguments, fitted, looking, own_tensors, run_once
from convtap._select.module_tree import is_keras
from convtap._select.parts import no_part
from convtap._select.selection import Selection, select
from convtap._tensors.nested import MISSING, part_of

_EIGHT_BITS = 2.0**-8

# Note: [Compiled sides]
# Assumption: hooks that are put on a compiled model are not in its code, and run eagerly it is not what was asked about.
# Choice: a compiled side is the same compiler (its backend, mode and options) on ``tapped(model)``, whose taps are traced
#   with the model. Taps can change what is fused, so the outputs of the model itself are compared as well, and where that
#   compiler did not compile anything, or may not, it is an error.


class _Side:
    """One of the two models: its layers, how it runs, and its calls one by one."""

    def __init__(
        self,
        label: str,
        model: nn.Module,
        layers: Any,
        types: tuple[type[nn.Module], ...],
        example: Any,
        mode: str | None,
    ) -> None:
        self.mode = mode
        self.label = label
        self.model = model
        self.python = _python_model(label, model)
        self.types = types
        self.example = fitted(example, self.python)
        self.selection: Selection = select(self.python, layers, types)
        self.flow: Flow = observe(self.python, list(self.selection.modules), self.selection.tree, self.example, mode)
        ran = self.flow.counts
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
        stream = Stream(self.python, layers, self.types, self.example, self.mode)
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
        with looking(self.python, self.mode), tapped(self.python, modules, types=self.types) as taps:
            if self.mode is not None:
                taps.train(self.mode == "train")
            _, outputs = self.model.dynamo_ctx(taps)(*args, **kwargs)  # type: ignore[operator]
        if dynamo.utils.counters["frames"]["ok"] == before:
            raise Unsupported(
                f"side {self.label} is compiled, but its compiler compiled nothing of it with taps, so it would have run "
                "eagerly. Compare the model that it was made from, or compile it with fullgraph=True to see why."
            )
        self.output = run_once(self.model, self.example, self.mode)
        found: dict[str, Any] = dict(outputs)
        return found

    def floor(self, name: str) -> float:
        """The step of a layer with weights of eight bits, whatever type it returns."""
        module = self.selection.tree.names.get(name)
        return _EIGHT_BITS if module is not None and ".quantized" in type(module).__module__ else 0.0


def compare_models(
    a: nn.Module,
    b: nn.Module,
    example: Any,
    map: Any,
    layers: Any,
    types: Any,
    tolerance: Tolerance,
    mode: str | None,
) -> Comparison:
    """Compares two models; see ``compare``."""
    kinds = check_arguments(a, layers, types)
    check_arguments(b, None, types)
    modes = _modes_text(a, b, mode)
    with ExitStack() as stack:
        stack.enter_context(looking(a, mode))
        stack.enter_context(looking(b, mode))
        one = _Side("a", a, layers, kinds, example, mode)
        two = _Side("b", b, None, kinds, example, mode)
        pairs, note = match(
            one.candidates(map, ()), two.candidates(map.values() if isinstance(map, dict) else (), one.layers), map
        )
        plan = Plan(one, two, pairs)
        ledger = Ledger(plan.pairs, tolerance)
        _run(one, two, plan, ledger, layers, stack)
        for number, side in enumerate((one, two)):
            if not (ledger.saw(number) or side.selection.modules):
                raise LayerNotFound(f"side {side.label}: {side.selection.nothing()}")
        for side in (one, two):
            if side.output is None:
                side.output = run_once(side.model, side.example, mode)
        ledger.compare(OUTPUT, OUTPUT, 0, one.output, two.output)
    compiled = [side.label for side in (one, two) if side.is_compiled]
    notes = [note, modes, f"compiled: {listed(compiled)}; {OUTPUT} is of the runs without taps" if compiled else ""]
    return ledger.close(notes)


def _modes_text(a: nn.Module, b: nn.Module, mode: str | None) -> str:
    """Says in which modes two models run, if it is not what they are in or not the same."""
    keras = [label for label, model in zip("ab", (a, b), strict=True) if is_keras(type(model))]
    if keras and mode == "train":
        raise Unsupported(
            f"side {keras[0]} is a Keras model, whose calls say whether it trains. Leave mode= out, and say it in the example: "
            "example={'inputs': x, 'training': True}."
        )
    training = [
        any(module.training for module in model.modules() if not is_keras(type(module))) and label not in keras
        for label, model in zip("ab", (a, b), strict=True)
    ]
    if mode == "train":
        return "both ran in train mode"
    if mode is None:
        if training == [False, False]:
            return ""
        one, two = ("train" if train else "eval" for train in training)
        return f"each ran in its own mode: a in {one} mode, b in {two} mode"
    which = [
        label if model.training else f"parts of {label}"
        for label, model, train in zip("ab", (a, b), training, strict=True)
        if train
    ]
    if not which:
        return ""
    were = "was" if which in (["a"], ["b"]) else "were"
    text = f"both ran in eval mode, and {' and '.join(which)} {were} in train mode"
    return f"{text}: mode='train' compares both in train mode, mode=None as they are"


def _run(one: _Side, two: _Side, plan: Plan, ledger: Ledger, layers: Any, stack: ExitStack) -> None:
    """Lets ``a`` lead, and ``b`` run until it has come to the partner; what ``b`` passes on the way waits."""
    theirs = two.calls(plan.taps(1, layers), plan.modules(1), stack)
    if two.is_compiled:
        theirs = iter(list(theirs))  # before the other side opens a block, in which nothing runs compiled
    waiting: dict[Run, Any] = {}
    wanted = plan.partners(1)
    unpaired = {name for name in two.layers if name not in wanted}
    for name, index, output in one.calls(plan.taps(0, layers), plan.modules(0), stack):
        run = (name, index)
        if plan.passes_by(0, run):
            continue
        partner = plan.partner(run)
        found = None if partner is None else _find(partner, waiting, theirs, unpaired)
        if found is not None and partner is not None:
            floor = max(one.floor(name), two.floor(partner[0]))
            for part in one.selection.parts.get(name, ("",)):
                mine, other = _part(one, name, part, output), part_of(found[0], part)
                keys = name + part, partner[0] + part
                ledger.parts.update(dict.fromkeys(keys, part))
                ledger.compare(*keys, index, mine, other, plan.notes.get(run, ""), floor, partner[1])
        elif name in plan.only_partners[0]:
            ledger.skip(0, name)
        else:
            ledger.lone(0, name, index)
    for run in [*waiting, *((name, index) for name, index, _ in theirs)]:
        if run[0] in plan.only_partners[1]:
            ledger.skip(1, run[0])
        elif not plan.passes_by(1, run):
            ledger.lone(1, *run)


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
