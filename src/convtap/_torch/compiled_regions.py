"""Includes the convolution key in compiled graphs, and excludes it from guards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from convtap._torch import convolution_key, dynamo_import
from convtap._torch.call_stack import is_called_by
from convtap._torch.lock import Lock

# Note: [Compiled regions]
# Assumption: every call of compiled code runs Python functions of Dynamo, which set the thread's callback: to a function on
#   entry, to None around each graph, and back on exit. They look up ``set_eval_frame`` and ``_maybe_set_eval_frame`` in
#   their module.
# Failure: the guards of compiled code compare the dispatch keys of its inputs, including the keys of the thread, and the
#   types of its modules' dicts. With the convolution key included and weights watched, each model would be recompiled.
# Choice: both names are replaced once per process, and so is ``transform_code_object``, which traces a function. In a thread
#   with a capture, the key is excluded while guards are checked and code is traced, and included while a graph runs. Weights
#   are not watched there. In other threads the replacements only call the originals. If torch changes these names, a model
#   is compiled once more, or a layer is reported as not seen. The branches of ``torch.cond`` and similar operators keep the
#   key.

_NAMES = ("set_eval_frame", "_maybe_set_eval_frame")
_TRACES = "transform_code_object"


class _Here(threading.local):
    """The calls of compiled code in this thread, outermost first.

    ``traced`` counts the functions that are being traced.
    """

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.traced = 0


class _Entry:
    """A call of compiled code.

    It holds the call's frame, the callback before the call, and whether the key was included.
    """

    __slots__ = ("frame", "included", "is_branch", "prior")

    def __init__(self, frame: FrameType) -> None:
        caller = frame.f_back
        self.frame = frame
        self.prior: Any = None
        self.included = convolution_key.is_included()
        self.is_branch = caller is not None and caller.f_globals.get("__name__", "").startswith(
            "torch._higher_order_ops"
        )


_here = _Here()
_lock = Lock()
_installed = False


def is_inside() -> bool:
    """Returns whether compiled code runs in this thread."""
    return bool(_here.entries) and not _here.entries[-1].is_branch


def is_tracing() -> bool:
    """Returns whether torch is tracing a function in this thread.

    Tensors then have no values, or values that are not the model's.
    """
    if _here.traced:
        return True
    return (
        bool(_here.entries) and _here.entries[-1].is_branch and is_called_by("create_fw_bw", "torch._higher_order_ops")
    )


def watch(who: object) -> None:
    """Replaces Dynamo's functions, once per process.

    If Dynamo is not imported yet, they are replaced after its import.
    """
    if _installed:
        return
    if dynamo_import.DYNAMO in sys.modules:
        _install()
    else:
        dynamo_import.then(who, _install)


def leave(who: object) -> None:
    """Stops waiting for Dynamo's import. A second call does nothing.

    See Note: [Interrupts].
    """
    dynamo_import.never_mind(who)


def _install() -> None:
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
        from torch._dynamo import convert_frame, eval_frame

        for name in _NAMES:
            original = getattr(eval_frame, name, None)
            if original is not None:
                setattr(eval_frame, name, _replaced(original, is_last=name == _NAMES[1]))
        if hasattr(convert_frame, _TRACES):
            setattr(convert_frame, _TRACES, _paused(getattr(convert_frame, _TRACES)))


def _replaced(original: Callable[[Any], Any], *, is_last: bool) -> Callable[[Any], Any]:
    def set_eval_frame(callback: Any) -> Any:
        if not convolution_key.has_captures():
            return original(callback)
        frame, entries = sys._getframe(1), _here.entries
        if entries and entries[-1].frame is frame:
            prior = original(callback)
            if is_last and callback is entries[-1].prior:
                _leave()
        elif _is_entry(frame) and not (is_last and callback is None):
            entry = _enter(frame)
            prior = entry.prior = original(callback)
        else:
            prior = original(callback)
            if is_inside() and not _here.traced:
                convolution_key.include(callback is None)  # a graph, or code that is not compiled, runs next
        return prior

    return set_eval_frame


def _is_entry(frame: FrameType) -> bool:
    """Returns whether a frame is a call of compiled code."""
    code = frame.f_code
    return code.co_name == "compile_wrapper" or (code.co_name == "_fn" and "callback" in code.co_freevars)  # torch 2.6


def _enter(frame: FrameType) -> _Entry:
    entry = _Entry(frame)
    if not _here.entries:
        for tap in convolution_key.taps():
            tap.pause()
    _here.entries.append(entry)
    if not entry.is_branch:
        convolution_key.include(False)
    return entry


def _leave() -> None:
    entry = _here.entries.pop()
    if not entry.is_branch:
        convolution_key.include(entry.included)
    if not _here.entries:
        for tap in convolution_key.taps():
            tap.compiled_code_ran = True
            tap.resume()


def _paused(original: Callable[..., Any]) -> Callable[..., Any]:
    def transform_code_object(*args: Any, **kwargs: Any) -> Any:
        taps = convolution_key.taps()
        try:
            _here.traced += 1
            for tap in taps:
                tap.pause()
            if is_inside():
                convolution_key.include(False)
            return original(*args, **kwargs)
        finally:
            _here.traced -= 1
            if is_inside():
                convolution_key.include(False)  # Dynamo makes the guards next
            elif not _here.entries:  # otherwise the taps stay paused until the compiled code returns
                for tap in taps:
                    tap.resume()

    return transform_code_object
