"""Checks on exit whether all selected layers were captured, and explains gaps."""

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
    """Raises an error or warns if outputs are missing in a capture.

    It is called when the capture ends without an exception.

    Raises:
        NotCaptured: if nothing was captured, a layer selected by exact name did not run, or a layer was bypassed.
        ConvtapError: if an output could not be recorded and the model swallowed the error.
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
        warn_user(f"some calls of the model are not in this capture.{_elsewhere(recorder, passes)}")
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
            f"the convolution of {listed(computed)} ran with a weight computed from its own (masked, scaled, pruned, cast). "
            f"Such a call has the name {FUNCTION!r}, which is not selected. Select it: layers=[..., {FUNCTION!r}]."
        )
    if not any(state.captured for state in states):
        return NotCaptured(
            f"nothing was captured: {_why_nothing(log, recorder, passes, selection, functional, compiled)}"
        )
    exact = [state.name for state in states if state.state == "idle" and state.name in log.exact and not state.computed]
    if exact:
        hint = "" if functional else " Remove functional=False to capture convolutions called as functions as well."
        gone = [name for name in exact if name in compiled]
        hint += f" {_compiled_away(gone, recorder)}" if gone else ""
        hint += _tied(exact, selection)
        return NotCaptured(
            f"{plural(len(exact), 'layer')} selected by name did not run: {listed(exact)}."
            f"{_elsewhere(recorder, passes)}{hint} {_USED}"
        )
    return None


def _bypassed(states: list[LayerCoverage]) -> str:
    by = listed([f"{state.name} ({state})" for state in states])
    return (
        f"the weight of {plural(len(states), 'selected layer')} was read, but convtap saw no convolution: {by}. A fused "
        "kernel or a product computes the layer, so it has no output to capture. Switch off that path in the model, or "
        f"capture the module around the layer by its name. {_USED}"
    )


def _why_nothing(
    log: Log, recorder: Recorder, passes: Passes, selection: Selection, functional: bool, compiled: Collection[str]
) -> str:
    if _threads(recorder, passes):
        return f"the{_elsewhere(recorder, passes).removeprefix(' The')}"
    if recorder.fakes:
        return (
            "the selected layers ran on fake tensors (FakeTensorMode, or a tracer such as torch.export), which have shapes "
            "but no values. Run the model on real tensors inside the capture."
        )
    if not selection.modules and selection.function_names:
        return f"no F.conv1d call used {listed(sorted(selection.function_names))}. {_USED}"
    if not selection.modules:
        hint = "" if functional else " Remove functional=False to capture F.conv1d calls as well."
        return selection.nothing() + hint
    if recorder.recomputed:
        return (
            "the selected layers ran only during a backward pass, in which activation checkpointing recomputes them. "
            "Run the forward pass inside the capture: with capture(model) as acts: model(x)"
        )
    if log.lacking:
        return (
            f"no output has the selected part: {listed(log.lacking)}. Select whole layers to see their outputs, or select "
            "other layers with types=."
        )
    unactivated = [state.name for state in log.states() if state.unactivated]
    if unactivated:
        return (
            f"the selected layers ran, but no activation followed them: {listed(unactivated)}.{_summed(recorder)} Capture "
            "the layers with at='output', capture the activations with types=nn.ReLU, or pass the types of the activations "
            "as activations=(...)."
        )
    gone = [name for name in selection.names if name in compiled]
    if gone and passes.inputs:
        return _compiled_away(gone, recorder)
    if not passes.inputs:
        return (
            "the model did not run inside the capture. Write: with capture(model) as acts: model(x). convtap does not see a "
            "model that runs in another process, such as a data-loader worker. Run the model in this process."
        )
    return (
        f"the model ran ({plural(len(passes.inputs), 'pass')}), but none of the selected layers did: "
        f"{listed(selection.names)}. {_USED}"
    )


def _compiled_away(names: list[str], recorder: Recorder) -> str:
    reasons = [f"{name}: {recorder.unseen[name]}" for name in names if name in recorder.unseen]
    because = f" {listed(reasons)}." if reasons else ""
    return (
        f"convtap saw no convolution of {plural(len(names), 'layer')} in compiled code: {listed(names)}. The layer is idle, or "
        f"the compiler fused or rewrote it.{because} Capture the original model without torch.compile, or compile "
        "convtap.tapped(model)."
    )


def _changed(
    states: list[LayerCoverage], recorder: Recorder, selection: Selection, compiled: Collection[str]
) -> Iterator[str]:
    """Yields warnings about selected layers that were replaced or compiled away."""
    if recorder.outside or any(state.state == "idle" for state in states):
        now = ModuleTree(selection.tree.model).names
        replaced = [name for name, module in selection.modules.items() if now.get(name) is not module]
        if replaced:
            yield (
                f"code inside the capture replaced or removed {plural(len(replaced), 'selected layer')}: {listed(replaced)}. "
                "Later outputs belong to the new module. Change the model before you open the capture."
            )
    gone = [state.name for state in states if state.state == "idle" and state.name in compiled]
    if gone:
        yield _compiled_away(gone, recorder)


def _tied(names: list[str], selection: Selection) -> str:
    """Names the layers that share their weight with an earlier layer.

    A function call with a shared weight has the earlier layer's name.
    """
    owners = {id(tensor): name for name, tensor in reversed(list(selection.tree.parameters()))}
    tied = []
    for name in names:
        module = selection.modules.get(name)
        weight = None if module is None else module.__dict__["_parameters"].get("weight")
        if weight is not None and owners.get(id(weight), name) != name:
            tied.append(f"{name!r} shares its weight with {owners[id(weight)]!r}")
    return f" {', '.join(tied)}, and a convolution called as a function has the latter name." if tied else ""


def _summed(recorder: Recorder) -> str:
    """Names the layers whose outputs were added to another tensor."""
    names = sorted(recorder.summed)
    return (
        f" A sum (a residual connection) follows {listed(names)}, so the activation belongs to the sum."
        if names
        else ""
    )


def _threads(recorder: Recorder, passes: Passes) -> dict[str, str]:
    """Returns the threads in which the model ran outside of the capture, and what ran."""
    return {
        **dict.fromkeys(passes.elsewhere, "the model"),
        **{t: repr(n) for t, n in recorder.elsewhere.copy().items()},
    }


def _elsewhere(recorder: Recorder, passes: Passes) -> str:
    threads = [f"{thread} ({what} ran there)" for thread, what in _threads(recorder, passes).items()]
    if not threads:
        return ""
    if TASK in _threads(recorder, passes):
        return (
            f" The model ran in a coroutine or context that began before the capture, so the capture is not open there: "
            f"{listed(threads)}. Open the capture in the coroutine that runs the model, or before the task is created."
        )
    return (
        f" The model ran in another thread, in which this capture is not open: {listed(threads)}. Open the capture in the "
        "thread that runs the model, or run the model there with contextvars.copy_context().run."
    )


def _idle(idle: list[str], selected: int) -> str:
    return (
        f"{len(idle)} of {plural(selected, 'selected layer')} did not run as modules: {listed(idle)}. Remove "
        f"functional=False to capture convolutions called as functions as well. {_USED}"
    )
