"""Defines convtap's exceptions and warnings.

It also has the phrases that messages share, such as lists of names and the most similar name.
"""

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
from convtap._spelling import printable


@public
class ConvtapError(Exception):
    """The base of all errors that convtap raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())

    def __repr__(self) -> str:
        return printable(super().__repr__())


class _MessageKeyError(ConvtapError, KeyError):
    """A KeyError that shows its message without quotes."""

    def __str__(self) -> str:
        return printable(str(self.args[0])) if self.args else ""


@public
class LayerNotFound(_MessageKeyError):
    """A selector or a key matches no layer (also a KeyError)."""


@public
class AmbiguousCall(_MessageKeyError):
    """A key is the plain name of a layer that ran several times (also a KeyError)."""


@public
class NotCaptured(ConvtapError):
    """An output, input or gradient that the user asked for was not captured."""


@public
class ModifiedInPlace(ConvtapError):
    """An alias (``copy=False``) was read after the model changed it in place."""


@public
class MemoryLimitExceeded(ConvtapError):
    """One more output would exceed ``max_bytes``."""


@public
class NonFiniteOutput(ConvtapError):
    """A layer produced NaN or Inf from finite inputs."""


@public
class StoreError(ConvtapError):
    """A file or a store directory cannot be read or written."""


@public
class MissingExtra(ConvtapError, ImportError):
    """An optional package is missing (also an ImportError).

    The message has the pip command.
    """


@public
class Unsupported(ConvtapError):
    """A request cannot be fulfilled. The message says what to write instead."""


@public
class OutOfRange(ConvtapError, IndexError):
    """A position, such as a sample number, does not exist (also an IndexError)."""


@public
class InvalidType(ConvtapError, TypeError):
    """An argument has the wrong type (also a TypeError)."""


@public
class InvalidValue(ConvtapError, ValueError):
    """An argument has an invalid value (also a ValueError)."""


@public
class CoverageWarning(UserWarning):
    """A selected layer was not captured, or padding has changed its output."""


@public
class OffloadWarning(UserWarning):
    """Outputs were offloaded more slowly than expected. None of them is missing."""


class StopForward(BaseException):
    """Ends a forward pass early (``stop=True``).

    It is not an Exception, so that a model's own ``except Exception`` does not catch it.
    """

    def __init__(self, token: object) -> None:
        super().__init__("convtap ends this forward pass early (stop=True)")
        self.token = token


#: How many names a message compares to find the most similar one, and how many characters of a value it shows.
_MANY, _LONG = 2000, 200


_PACKAGE = os.path.dirname(__file__)
#: Files whose frames lie between the user's code and convtap's: those of context managers and of module calls.
_BETWEEN = (contextlib.__file__, os.path.join("torch", "nn", "modules", "module.py"))


def warn_user(message: str, category: type[Warning] = CoverageWarning) -> None:
    """Issues a warning at the user's own line, such as a ``with`` statement or a call."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level - (frame is None))


def _is_inside(file: str) -> bool:
    return file.startswith(_PACKAGE) or file.endswith(_BETWEEN)


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Joins the first ``limit`` names for a message, with the total if there are more."""
    every = list(names)
    if not every:
        return "none"
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown}, … ({len(every)})"


def brief(value: object) -> str:
    """Returns the repr of a value for a message, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Returns the name most similar to ``name``, or None if none is similar.

    A name that contains all parts of ``name`` in a row comes first, and so does a name that ``name`` contains in this way.
    The reason is that wrappers add parts in front (``module.``, ``base_model.model.``), and some add a part at the end.
    """
    inside = [other for other in names if other and (f".{name}." in f".{other}." or f".{other}." in f".{name}.")]
    if inside and name:
        return min(inside, key=lambda other: (abs(len(other) - len(name)), other))
    if len(names) > _MANY:  # a comparison takes microseconds, so compare only names of a similar length
        names = heapq.nsmallest(_MANY, names, key=lambda other: abs(len(other) - len(name)))
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Returns `` Did you mean 'x'?``, or an empty string if no name is similar."""
    near = nearest(name, names)
    return f" Did you mean {near!r}?" if near else ""


def plural(count: int, noun: str) -> str:
    """Counts a noun: ``1 call``, ``3 calls``, ``2 passes``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class name if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
