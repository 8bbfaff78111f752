"""Checks a capture on exit: whether everything selected was captured, and if not, why and what to write."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from convtap._errors import ConvtapError, NotCaptured, listed, plural, warn_user
from convtap._record.forward_passes import TASK, Passes
from convtap._record.recorder import Recorder
from convtap._result.coverage import LayerCoverage
from convtap._result.log import Log
from convtap._select.module_tree import ModuleTree
from convtap._select.selection import FUNCTION, Selection

_USED = "list_layers(model, example=x) shows how each layer is used."


def report_missing(
    log: Log,
    recorder: Recorder,
    passes: Passes,
    selection: Selection,
    *,
    strict: bool,
    functional: bool,
    compiled: Collection[str] = (),
) -> None:
    """Raises or warns about what is missing in a block that ended without an exception.

    Raises:
        NotCaptured: nothing was captured, a layer asked for by exact name did not run, or one was bypassed.
        ConvtapError: an output could not be recorded, and the model swallowed the error.
    """
    error = recorder.failure or _missing(log, recorder, passes, selection, functional, compiled)
    if error is not None:
        if strict:
            raise error from None
        warn_user(str(error))
        return
    states = log.states()
    partly = [state for state in states if state.captured and state.bypasses]
    if partly:
        warn_user(_bypassed(partly))
    if _threads(recorder, passes):
        warn_user(f"some of the model's calls are not in this block.{_elsewhere(recorder, passes)}")
    for message in _changed(states, recorder, selection, compiled):
        warn_user(message)
    idle = [] if functional else [state.name for state in states if state.state == "idle"]
    if idle:
        warn_user(_idle(idle, len(log.selected)))


def _missing(
    log: Log, recorder: Recorder, passes: Passes, selection: Selection, functional: bool, compiled: Collection[str]
) -> ConvtapError | None:
    states = log.states()
    bypassed = [state for state in states if state.state == "bypassed" and not state.computed]
    if bypassed:
        return NotCaptured(_bypassed(bypassed))
    computed = [state.name for state in states if state.computed and not state.captured]
    if computed and not selection.wants(FUNCTION):
        return NotCaptured(
            f"the convolution of {listed(computed)} ran with a weight computed from its own (masked, scaled, pruned, cast), "
            f"and such a call is named {FUNCTION!r}, which is not selected. Add it: layers=[..., {FUNCTION!r}]."
        )
    if not any(state.captured for state in states):
        return NotCaptured(
            f"nothing was captured: {_why_nothing(log, recorder, passes, selection, functional, compiled)}"
        )
    exact = [state.name for state in states if state.state == "idle" and state.name in log.exact and not state.computed]
    if exact:
        hint = "" if functional else " Without functional=False, convolutions called as functions are seen as well."
        gone = [name for name in exact if name in compiled]
        hint += f" {_compiled_away(gone, recorder)}" if gone else ""
        hint += _tied(exact, selection)
        return NotCaptured(
            f"asked for by name, but did not run: {listed(exact)}.{_elsewhere(recorder, passes)}{hint} {_USED}"
        )
    return None


def _bypassed(states: list[LayerCoverage]) -> str:
    by = listed([f"{state.name} ({state})" for state in states])
    return (
        f"the weight of {plural(len(states), 'selected layer')} was used without a convolution that could be seen: {by}. "
        "A fused kernel or a product computes it, so there is no output to capture: switch that path off in the model, or "
        f"capture the block around the layer by its name. {_USED}"
    )


def _why_nothing(
    log: Log, recorder: Recorder, passes: Passes, selection: Selection, functional: bool, compiled: Collection[str]
) -> str:
    if _threads(recorder, passes):
        return _elsewhere(recorder, passes).strip()
    if recorder.fakes:
        return (
            "the selected layers ran on fake tensors (FakeTensorMode, or a tracer such as torch.export), which have shapes "
            "and no values. Run the model on real tensors inside the capture."
        )
    if not selection.modules and selection.function_names:
        return f"no F.conv1d call used {listed(sorted(selection.function_names))}. {_USED}"
    if not selection.modules:
        hint = "" if functional else " F.conv1d calls were not watched here: leave functional=False out."
        return selection.nothing() + hint
    if recorder.recomputed:
        return (
            "the selected layers ran only during a backward pass (activation checkpointing recomputes them there). "
            "Put the forward pass inside the block: with capture(model) as acts: model(x)"
        )
    if log.lacking:
        return (
            f"no output has the part that was asked for: {listed(log.lacking)}. Select the layers whole to see what they "
            "return, or other ones with types=."
        )
    unactivated = [state.name for state in log.states() if state.unactivated]
    if unactivated:
        return (
            f"the selected layers ran, but no activation followed them: {listed(unactivated)}.{_summed(recorder)} Capture "
            "them with at='output', capture the activations themselves with types=nn.ReLU, or name the types that count as "
            "activations with activations=(...)."
        )
    gone = [name for name in selection.names if name in compiled]
    if gone and passes.inputs:
        return _compiled_away(gone, recorder)
    if not passes.inputs:
        return (
            "the model did not run inside the block. Write: with capture(model) as acts: model(x). If another process runs "
            "it, such as a data-loader worker, its outputs do not come back: run the model in this process."
        )
    return (
        f"the model ran ({plural(len(passes.inputs), 'pass')}), but none of the selected layers did: "
        f"{listed(selection.names)}. {_USED}"
    )


def _compiled_away(names: list[str], recorder: Recorder) -> str:
    reasons = [f"{name}: {recorder.unseen[name]}" for name in names if name in recorder.unseen]
    because = f" {listed(reasons)}." if reasons else ""
    return (
        f"no convolution of {plural(len(names), 'layer')} of a compiled part was seen: {listed(names)}. The layer is idle, or "
        f"the compiler has fused or rewritten it.{because} Capture the model that you compiled, uncompiled, or run "
        "convtap.tapped(model) compiled."
    )


def _changed(
    states: list[LayerCoverage], recorder: Recorder, selection: Selection, compiled: Collection[str]
) -> Iterator[str]:
    """What to say of selected layers that were replaced, or compiled away."""
    if recorder.outside or any(state.state == "idle" for state in states):
        now = ModuleTree(selection.tree.model).names
        replaced = [name for name, module in selection.modules.items() if now.get(name) is not module]
        if replaced:
            yield (
                f"{plural(len(replaced), 'selected layer')} was replaced or taken out of the model inside the capture: "
                f"{listed(replaced)}. What ran after that is the new module's. Change the model before the capture."
            )
    gone = [state.name for state in states if state.state == "idle" and state.name in compiled]
    if gone:
        yield _compiled_away(gone, recorder)


def _tied(names: list[str], selection: Selection) -> str:
    """Says of which layers the weight is also another layer's, whose name its convolutions have then."""
    owners = {id(tensor): name for name, tensor in reversed(list(selection.tree.parameters()))}
    tied = []
    for name in names:
        module = selection.modules.get(name)
        weight = None if module is None else module.__dict__["_parameters"].get("weight")
        if weight is not None and owners.get(id(weight), name) != name:
            tied.append(f"the weight of {name!r} is that of {owners[id(weight)]!r}")
    return f" {'; '.join(tied)}: a convolution called as a function with it has that name." if tied else ""


def _summed(recorder: Recorder) -> str:
    """Says which layers' outputs went into a sum, behind which an activation is the sum's."""
    names = sorted(recorder.summed)
    return (
        f" Added to another tensor first (a residual sum): {listed(names)}; what follows is of the sum."
        if names
        else ""
    )


def _threads(recorder: Recorder, passes: Passes) -> dict[str, str]:
    """The threads in which the model ran without this capture, each with what ran."""
    return {
        **dict.fromkeys(passes.elsewhere, "the model"),
        **{t: repr(n) for t, n in recorder.elsewhere.copy().items()},
    }


def _elsewhere(recorder: Recorder, passes: Passes) -> str:
    threads = [f"{thread} (there {what} ran)" for thread, what in _threads(recorder, passes).items()]
    if not threads:
        return ""
    if TASK in _threads(recorder, passes):
        return (
            f" The model ran in a coroutine or context that began before the capture, where it is not open: "
            f"{listed(threads)}. Open the capture in the coroutine that runs the model, or before the task is created."
        )
    return (
        f" The model ran in another thread, where this block is not open: {listed(threads)}. Enter the block in the "
        "thread that runs the model, or run it there with contextvars.copy_context().run."
    )


def _idle(idle: list[str], selected: int) -> str:
    return (
        f"{len(idle)} of {plural(selected, 'selected layer')} did not run as modules: {listed(idle)}. Convolutions "
        "called as functions are not seen with functional=False: leave it out to capture them as well. "
        f"{_USED}"
    )
