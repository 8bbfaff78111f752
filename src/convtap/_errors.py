"""The exceptions of convtap, and the phrases their messages share: lists of names, and the nearest name."""

from __future__ import annotations

import contextlib
import difflib
import heapq
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType

from convtap._public import public


@public
class ConvtapError(Exception):
    """Base of every error that convtap raises on purpose."""


class _MessageKeyError(ConvtapError, KeyError):
    """A KeyError that shows its message as it was written (KeyError itself quotes it)."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@public
class LayerNotFound(_MessageKeyError):
    """A selector or a key names no layer."""


@public
class AmbiguousCall(_MessageKeyError):
    """A layer ran several times, and its plain name was asked for."""


@public
class NotCaptured(ConvtapError):
    """A block ended and something that was asked for is not in it."""


@public
class ModifiedInPlace(ConvtapError):
    """An alias (``copy=False``) was read after the model changed it in place."""


@public
class MemoryLimitExceeded(ConvtapError):
    """Storing one more output would go over ``max_bytes``."""


@public
class NonFiniteOutput(ConvtapError):
    """A layer produced NaN or Inf from finite inputs."""


@public
class StoreError(ConvtapError):
    """A file or a store directory cannot be read or written as asked."""


@public
class MissingExtra(ConvtapError, ImportError):
    """An optional package is needed; the message holds the pip command."""


@public
class Unsupported(ConvtapError):
    """What was asked cannot be done right here, and the message says what can."""


@public
class OutOfRange(ConvtapError, IndexError):
    """A position, such as a sample, that does not exist (also an IndexError)."""


@public
class InvalidType(ConvtapError, TypeError):
    """An argument is of the wrong type (also a TypeError)."""


@public
class InvalidValue(ConvtapError, ValueError):
    """An argument has a value that cannot be used (also a ValueError)."""


@public
class CoverageWarning(UserWarning):
    """Something that was selected was not captured, or not as the input alone gives it."""


@public
class OffloadWarning(UserWarning):
    """Outputs were offloaded in a slower way than meant; none of them is missing."""


class StopForward(BaseException):
    """Ends a forward pass early. No Exception, so that a model's own ``except Exception`` lets it through."""

    def __init__(self, token: object) -> None:
        super().__init__("convtap ends this forward pass early (stop=True)")
        self.token = token


#: Names that a message looks through for the nearest one, and characters of a value in it.
_MANY, _LONG = 2000, 200


_PACKAGE = os.path.dirname(__file__)
#: Files whose frames lie between the user's code and convtap's: of context managers, and of the calls of modules.
_BETWEEN = (contextlib.__file__, os.path.join("torch", "nn", "modules", "module.py"))


def warn_user(message: str, category: type[Warning] = CoverageWarning) -> None:
    """Warns at the line outside of convtap that led here: the user's ``with`` statement or call."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level - (frame is None))


def _is_inside(file: str) -> bool:
    return file.startswith(_PACKAGE) or file.endswith(_BETWEEN)


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Joins names for a message: the first ``limit`` of them, and how many there are."""
    every = list(names)
    if not every:
        return "none"
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown}, … ({len(every)})"


def brief(value: object) -> str:
    """Writes a value for a message: its repr, cut short if it is long."""
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Returns the name most like ``name``, or None if none is at all like it.

    A name that has the same parts in a row, or parts that lie in ``name`` so, comes first: wrappers of models add parts
    (``module.``, ``base_model.model.``), and some add one behind.
    """
    inside = [other for other in names if other and (f".{name}." in f".{other}." or f".{other}." in f".{name}.")]
    if inside and name:
        return min(inside, key=lambda other: (abs(len(other) - len(name)), other))
    if len(names) > _MANY:  # each comparison takes microseconds: of many names, those of about the same length
        names = heapq.nsmallest(_MANY, names, key=lambda other: abs(len(other) - len(name)))
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Returns `` Did you mean 'x'?``, or nothing if no name is near."""
    near = nearest(name, names)
    return f" Did you mean {near!r}?" if near else ""


def plural(count: int, noun: str) -> str:
    """Counts a noun: ``1 call``, ``3 calls``, ``2 passes``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
