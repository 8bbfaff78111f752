"""Writes text, notes and progress to the terminal."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from convtap._dataset.progress_bar import is_watched, progress_bar
from convtap._errors import CoverageWarning, OffloadWarning, StoreError
from convtap._spelling import HANDLER

# Note: [Any encoding]
# Assumption: a terminal or a pipe has its own encoding (cp1252, cp437, ascii), and the tables contain characters such as ×.
# Failure: Python raises UnicodeEncodeError for a character that the encoding lacks, and the command prints nothing.
# Choice: while a command runs, its streams have an error handler that spells such a character in ASCII. This includes the
#   help and the output of the user's model. A character that the encoding has stays as it is.


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Lets the standard streams accept any text. See Note: [Any encoding]."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [(stream, stream.errors) for stream in streams]
    try:
        for stream in streams:
            with contextlib.suppress(ValueError):  # the stream is closed
                stream.reconfigure(errors=HANDLER)
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader has exited
                stream.reconfigure(errors=errors)


# -- text


def say(text: object) -> None:
    """Prints to standard output.

    If the reader exits early (``| head``), later output is discarded, and the command continues.

    Raises:
        StoreError: the output cannot be written, for example because the disk is full.
    """
    try:
        print(text)
        flush()
    except OSError as error:
        _silence(error)


def flush() -> None:
    """Flushes standard output.

    Raises:
        StoreError: the output cannot be written.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _silence(error)


def complain(text: str) -> None:
    """Prints one line to standard error, with Python arguments written as options."""
    text = _LIST_LAYERS.sub("convtap layers MODEL", " ".join(text.split()))
    text = _OPTION.sub(lambda found: f"--{found[1].replace('_', '-')} {found[3]}", text)
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)


#: Python code in the messages of the library.
_LIST_LAYERS = re.compile(r"list_layers\(model(, example=x)?\)")
_OPTION = re.compile(r"\b(types|at|every|time_dim|sample_rate|sample)=(?:nn\.)?('?)(-?\w+)\2")


def _silence(error: OSError) -> None:
    """Redirects standard output to the null device after a write error."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # since Python flushes the stream's buffer on exit
        os.close(nowhere)
    # Windows does not have a separate error for a pipe that the reader has closed
    if not (isinstance(error, BrokenPipeError) or error.errno in (errno.EPIPE, errno.EINVAL)):
        raise StoreError(
            f"standard output cannot be written: {error.strerror or error}. Redirect it to another file."
        ) from error


# -- notes and progress


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Collects convtap's warnings, and prints each once to standard error on exit."""
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


class Progress:
    """A progress bar over the steps of a command, if standard error is a terminal.

    The bar disappears when the command ends.
    """

    def __init__(self, total: int) -> None:
        form = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}] {desc}"
        self._bar: Any = progress_bar(total=total, bar_format=form, leave=False, disable=not is_watched())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Shows a description while the body runs, and counts the step when it succeeds."""
        self._bar.set_description_str(what)
        yield
        self._bar.update()

    def add(self, steps: int) -> None:
        """Adds steps that were unknown at the start."""
        if self._bar.total is not None:
            self._bar.total += steps
