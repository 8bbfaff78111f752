"""What to say when a block ends: whether everything that was asked for is there, and if not, why and what to write."""

from __future__ import annotations

import warnings

from convtap._coverage import LayerCoverage
from convtap._errors import ConvtapError, CoverageWarning, NotCaptured, listed, plural
from convtap._log import Log
from convtap._passes import Passes
from convtap._record import Recorder
from convtap._select import FUNCTION, Selection

_USED = "list_layers(model, example=x) shows how each layer is used."


def conclude(
    log: Log, recorder: Recorder, passes: Passes, selection: Selection, *, strict: bool, functional: bool
) -> None:
    """Raises or warns about what is missing in a block that ended without an exception.

    Raises:
        NotCaptured: nothing was captured, a layer asked for by exact name did not run, or one was bypassed.
        ConvtapError: an output could not be recorded, and the model swallowed the error.
    """
    error = recorder.failure or _missing(log, recorder, passes, selection, functional)
    if error is not None:
        if strict:
            raise error from None
        _warn(str(error))
        return
    states = log.states()
    partly = [state for state in states if state.captured and state.bypasses]
    if partly:
        _warn(_bypassed(partly))
    if recorder.elsewhere:
        _warn(f"some of the model's calls are not in this block.{_elsewhere(recorder)}")
    idle = [] if functional else [state.name for state in states if state.state == "idle"]
    if idle:
        _warn(_idle(idle, len(log.selected)))


def _warn(message: str) -> None:
    warnings.warn(message, CoverageWarning, stacklevel=5)  # at the user's with statement


def _missing(
    log: Log, recorder: Recorder, passes: Passes, selection: Selection, functional: bool
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
        return NotCaptured(f"nothing was captured: {_why_nothing(log, recorder, passes, selection, functional)}")
    exact = [state.name for state in states if state.state == "idle" and state.name in log.exact and not state.computed]
    if exact:
        hint = "" if functional else " With functional=True, convolutions called as functions are seen as well."
        return NotCaptured(f"asked for by name, but did not run: {listed(exact)}.{_elsewhere(recorder)}{hint} {_USED}")
    return None


def _bypassed(states: list[LayerCoverage]) -> str:
    by = listed([f"{state.name} ({state})" for state in states])
    return (
        f"the weight of {plural(len(states), 'selected layer')} was used without a convolution that could be seen: {by}. "
        "A fused kernel or a product computes it, so there is no output to capture: switch that path off in the model, or "
        f"capture the block around the layer by its name. {_USED}"
    )


def _why_nothing(log: Log, recorder: Recorder, passes: Passes, selection: Selection, functional: bool) -> str:
    if recorder.elsewhere:
        return _elsewhere(recorder).strip()
    if not selection.modules and selection.function_names:
        return f"no F.conv1d call used {listed(sorted(selection.function_names))}. {_USED}"
    if not selection.modules:
        hint = "" if functional else " F.conv1d calls were not watched here: functional=True captures them as well."
        return selection.nothing() + hint
    if recorder.recomputed:
        return (
            "the selected layers ran only during a backward pass (activation checkpointing recomputes them there). "
            "Put the forward pass inside the block: with capture(model) as acts: model(x)"
        )
    unactivated = [state.name for state in log.states() if state.unactivated]
    if unactivated:
        return (
            f"the selected layers ran, but no activation followed them: {listed(unactivated)}. Capture them with "
            "at='output', or name the types that count as activations with activations=(...)."
        )
    if not passes.inputs:
        return "the model did not run inside the block. Write: with capture(model) as acts: model(x)"
    return (
        f"the model ran ({plural(len(passes.inputs), 'pass')}), but none of the selected layers did: "
        f"{listed(selection.names)}. {_USED}"
    )


def _elsewhere(recorder: Recorder) -> str:
    threads = [f"{thread} (there {name!r} ran)" for thread, name in recorder.elsewhere.items()]
    if not threads:
        return ""
    return (
        f" The model ran in another thread, where this block is not open: {listed(threads)}. Enter the block in the "
        "thread that runs the model, or run it there with contextvars.copy_context().run."
    )


def _idle(idle: list[str], selected: int) -> str:
    return (
        f"{len(idle)} of {plural(selected, 'selected layer')} did not run as modules: {listed(idle)}. Convolutions "
        "called as functions are not seen in this block: pass functional=True to capture them as well. "
        f"{_USED}"
    )
