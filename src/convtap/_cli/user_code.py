"""Runs the user's code: what fails in it becomes one sentence, with the error and the line that raised it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from convtap._errors import ConvtapError, InvalidValue

_LONG = 400
_PACKAGE, _TORCH = (os.path.dirname(os.path.dirname(path)) for path in (__file__, torch.__file__))
_LIBRARIES = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {_PACKAGE + os.sep, os.path.join(_TORCH, "torch") + os.sep, "<"}
)


def run_user_code(what: str, function: Callable[..., Any], *args: Any, fix: str = "", **kwargs: Any) -> Any:
    """Calls a function that runs code of the user's.

    Args:
        what: the beginning of the sentence, such as ``"'mynet:build' failed"``.
        function: what to call.
        fix: the sentence that says what to do.

    Raises:
        InvalidValue: the function failed; an error of convtap's is raised as it is.
    """
    try:
        return function(*args, **kwargs)
    except ConvtapError:
        raise
    except SystemExit as error:
        raise InvalidValue(
            f"{what}: it ended the program with sys.exit({error.code!r}){_line(error)}. Put what is to run in a script only "
            "below: if __name__ == '__main__':"
        ) from error
    except BrokenPipeError as error:
        raise InvalidValue(
            f"{what}: it prints to a pipe whose reader has closed it{_line(error)}. Write the output to a file: > out.txt"
        ) from error
    except Exception as error:
        raise InvalidValue(f"{what}: {told(error)}.{fix and ' '}{fix}") from error


def told(error: BaseException) -> str:
    """Returns the last line of an error's traceback, and the line of the user's code that it comes from."""
    text = " ".join(str(error).split()).rstrip(".")
    if len(text) > _LONG:
        text = f"{text[:_LONG]}…"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({_shown(error.filename)}:{error.lineno})"
    return f"{type(error).__name__}{text and ': '}{text}{_line(error)}"


def _line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith((_PACKAGE + os.sep, "<"))]
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or outside
    return f" ({_shown(own[-1].filename)}:{own[-1].lineno})" if own else ""


def _shown(file: str) -> str:
    """Writes a path as seen from the current folder, if it lies in it."""
    path = Path(file)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
