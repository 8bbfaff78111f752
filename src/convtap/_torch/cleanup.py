"""Takes off again what was put on, also where an interrupt strikes while that is being done."""

from __future__ import annotations

from collections.abc import Callable

# Note: [Interrupts]
# Assumption: Python raises KeyboardInterrupt between any two calls in the main thread, so also between two lines of an
#   exit, and what is left undone then is never done.
# Failure: hooks that stay on the model, a function mode that stays on the thread, a stance that stays forced.
# Choice: what puts something on says so first; what takes it off may be repeated, and finishes what an interrupted run of
#   it left (sets, not counts; look, then remove). ``undo`` repeats an interrupted step, and its callers call it twice, for
#   an interrupt between its own lines. What remains is an interrupt in the first instruction of ``__exit__``: then the
#   block ends when its guard is freed, with the traceback that holds it. A guard that is done with has no ``__del__``, for
#   an interrupt in one is lost.


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
