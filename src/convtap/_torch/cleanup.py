"""Undoes the steps of a capture, even if an interrupt strikes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Note: [Interrupts]
# Assumption: Python may raise KeyboardInterrupt between any two calls in the main thread, so also between two lines of an
#   exit. The rest of the exit then never runs.
# Failure: hooks stay on the model, a function mode stays on the thread, and a forced stance stays in the process.
# Choice: a step is listed before it is needed, and it can be repeated: it finishes the work of an interrupted run (it uses
#   sets instead of counts, and checks before it removes). ``undo`` repeats an interrupted step. Its callers call it twice,
#   in case an interrupt strikes between its own lines. ``contextlib.ExitStack`` does not work here: it removes a step from
#   its list before it runs the step, so an interrupted step is never finished. One case remains, an interrupt in the first
#   instruction of ``__exit__``: then the session ends when its guard is freed together with the traceback. A spent guard
#   has no ``__del__``, since Python drops an interrupt in ``__del__``.


def undo(steps: list[Callable[[], object]]) -> None:
    """Runs the steps, last first, and empties the list.

    All steps run, even if one of them raises.

    Raises:
        BaseException: the first error, after all steps have run.
    """
    first: BaseException | None = None
    while steps:
        try:
            while steps:
                steps[-1]()
                steps.pop()
        except BaseException as error:
            first = first or error
            if isinstance(error, Exception):
                steps.pop()  # it would fail again; only an interrupted step runs again
    if first is not None:
        try:
            raise first
        finally:
            first = None  # its traceback holds this frame, and this frame must not hold it


@contextmanager
def undone(steps: list[Callable[[], object]]) -> Iterator[None]:
    """A context that runs the steps at its end. See Note: [Interrupts].

    It needs no guard: an interrupt before the end frees the generator, which then runs its ``finally``.
    """
    try:
        yield
    finally:
        try:  # without a call before it
            undo(steps)
        finally:
            undo(steps)  # nothing, unless an interrupt struck


class Guard:
    """Runs the steps when it is freed, unless it has become ``Spent``."""

    __slots__ = ("steps",)

    def __init__(self, steps: list[Callable[[], object]]) -> None:
        self.steps = steps

    def __del__(self) -> None:
        undo(getattr(self, "steps", []))  # no steps if an interrupt came before __init__


class Spent:
    """The class that a guard gets when its steps have run."""

    __slots__ = ("steps",)
