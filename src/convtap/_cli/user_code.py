"""Runs the user's code, and reports its errors as one line."""

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
    """Calls a function that runs the user's code.

    Args:
        what: the beginning of the message, such as ``"'mynet:build' failed"``.
        function: the function to call.
        args: its positional arguments.
        fix: the sentence with the fix.
        kwargs: its keyword arguments.

    Raises:
        InvalidValue: the function failed. An error of convtap is raised unchanged.
    """
    try:
        return function(*args, **kwargs)
    except (ConvtapError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise InvalidValue(
            f"{what}: it called sys.exit({error.code!r}){_line(error)}. Move the code of the script below: "
            "if __name__ == '__main__':"
        ) from error
    except BrokenPipeError as error:
        raise InvalidValue(
            f"{what}: it printed to a pipe that the reader has closed{_line(error)}. Write the output to a file: > out.txt"
        ) from error
    except BaseException as error:  # also asyncio.CancelledError and GeneratorExit
        raise InvalidValue(f"{what}: {told(error)}.{fix and ' '}{fix}") from error


def told(error: BaseException) -> str:
    """Returns an error as one line, with the line of user code that raised it."""
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
    """Returns a path relative to the current folder, if it lies inside."""
    path = Path(file)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
