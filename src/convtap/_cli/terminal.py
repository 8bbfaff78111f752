"""Writes to the terminal: in any encoding, quietly once the reader has gone, with progress where a person sees it."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from convtap._errors import CoverageWarning, OffloadWarning, StoreError

# Note: [Any encoding]
# Assumption: a terminal or a pipe has an encoding of its own (cp1252, cp437, ascii), and the tables have signs such as × and …
# Failure: Python raises UnicodeEncodeError for a sign that the encoding lacks, and the command ends before it says anything.
# Choice: while a command runs, its streams have an error handler that spells such a sign in ASCII, also in the help and in
#   what the user's model prints. A sign that the encoding has stays as it is.

_HANDLER = "convtap.spelled"

#: How a sign is spelled where Unicode itself has no plain form of it.
_SPELLED = {
    **dict.fromkeys("–—−‐‑", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("→↦", "->"),
    **dict.fromkeys("·∙•", "*"),
    **dict.fromkeys("●○", "o"),
    **dict.fromkeys("×✕", "x"),
    **dict.fromkeys("µμ", "u"),
    **dict(
        zip(
            "±…≤≥≠←∞‖√ε°ß", ("+/-", "...", "<=", ">=", "!=", "<-", "inf", "||", "sqrt", "eps", "deg", "ss"), strict=True
        )
    ),
}


def spelled(sign: str) -> str:
    """Returns a sign in ASCII: ``x`` for ×, ``e`` for é; its code for one that has no such form."""
    if unicodedata.combining(sign):  # the accent of a letter that was written as two
        return ""
    plain = "".join(_SPELLED.get(part, part) for part in unicodedata.normalize("NFKD", _SPELLED.get(sign, sign)))
    return plain.encode("ascii", "ignore").decode() or sign.encode("ascii", "backslashreplace").decode()


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(spelled, error.object[error.start : error.end])), error.end


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Lets the standard streams take any text. See Note: [Any encoding]."""
    codecs.register_error(_HANDLER, _spell)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [(stream, stream.errors) for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors=_HANDLER)
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone
                stream.reconfigure(errors=errors)


# -- text


def say(text: object) -> None:
    """Prints to standard output. Once its reader has gone (``| head``), nothing more is printed, and the command goes on.

    Raises:
        StoreError: the output cannot be written, such as to a full disk.
    """
    try:
        print(text)
        flush()
    except OSError as error:
        _silence(error)


def flush() -> None:
    """Writes out what standard output holds back.

    Raises:
        StoreError: as ``say``.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _silence(error)


def complain(text: str) -> None:
    """Prints one line to standard error, where it can; what is said of options in Python, it says of those of a command."""
    text = _LIST_LAYERS.sub("convtap layers MODEL", " ".join(text.split()))
    text = _OPTION.sub(lambda found: f"--{found[1].replace('_', '-')} {found[3]}", text)
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)


#: What the messages of the library say in Python.
_LIST_LAYERS = re.compile(r"list_layers\(model(, example=x)?\)")
_OPTION = re.compile(r"\b(types|at|every|time_dim|sample_rate|sample)=(?:nn\.)?('?)(-?\w+)\2")


def _silence(error: OSError) -> None:
    """Leads standard output to nowhere after an error of it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what the stream still holds, Python writes at its end
        os.close(nowhere)
    # Windows has no error of its own for a pipe that the reader has closed
    if not (isinstance(error, BrokenPipeError) or error.errno in (errno.EPIPE, errno.EINVAL)):
        raise StoreError(
            f"standard output cannot be written: {error.strerror or error}. Redirect it to another file."
        ) from error


# -- notes and progress


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Collects convtap's own warnings, and prints each once as a line on standard error at the end."""
    found: dict[str, None] = {}
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, (CoverageWarning, OffloadWarning)):
                found[str(message)] = None
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = note
        for category in (CoverageWarning, OffloadWarning):
            warnings.simplefilter("always", category)
        try:
            yield
        finally:
            for text in found:
                complain(f"note: {text}")


def is_watched() -> bool:
    """Whether a person sees what goes to standard error."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


class Progress:
    """A bar over the steps of a command, on standard error and only on a terminal; it goes when the command is done."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        form = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}] {desc}"
        self._bar: Any = tqdm(total=total, bar_format=form, leave=False, disable=not is_watched())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Shows what runs while the body does, and counts it when it is done."""
        self._bar.set_description_str(what)
        yield
        self._bar.update()

    def add(self, steps: int) -> None:
        """Adds steps that were not known at the start."""
        if self._bar.total is not None:
            self._bar.total += steps
