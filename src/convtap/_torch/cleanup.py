"""Removes again what was registered, also if an interrupt strikes meanwhile."""

from __future__ import annotations

from collections.abc import Callable

# Note: [Interrupts]
# Assumption: Python raises KeyboardInterrupt between any two calls in the main thread, so also between two lines of an
#   exit, and what is left undone then is never done.
# Failure: hooks stay on the model, a function mode on the thread, and a forced stance in the process.
# Choice: a step is listed before it is needed, and may be repeated: it finishes what an interrupted run of it left (sets, not
#   counts; look, then remove). ``undo`` repeats an interrupted step, and its callers call it twice, for an interrupt
#   between its own lines. ``contextlib.ExitStack`` would not do: it takes a step from its list before it runs it, so an
#   interrupted step is never finished. What remains is an interrupt in the first instruction of ``__exit__``: then the
#   session ends when its guard is freed, with the traceback that holds it. A guard that is done with has no ``__del__``,
#   since an interrupt in one is lost.


def undo(steps: list[Callable[[], object]]) -> None:
    """Runs the steps, last first, and empties the list; an error does not keep the others from running.

    Raises:
        BaseException: the first error, once all have run.
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
                steps.pop()  # it would fail again; an interrupted one is run again
    if first is not None:
        raise first


class Guard:
    """Runs the steps if it is freed before ``spent``."""

    __slots__ = ("steps",)

    def __init__(self, steps: list[Callable[[], object]]) -> None:
        self.steps = steps

    def __del__(self) -> None:
        undo(getattr(self, "steps", []))  # an interrupt before __init__ leaves none


class Spent:
    """What a guard becomes (by its ``__class__``) when it has nothing to guard any more."""

    __slots__ = ("steps",)
