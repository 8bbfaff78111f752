"""The entry point of the command line, ``convtap``."""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path
from typing import Any, NoReturn

from convtap._cli.commands import add_commands
from convtap._cli.exit_status import INTERRUPTED, MEANING, SAME, TROUBLE
from convtap._cli.model import own_path
from convtap._cli.terminal import any_encoding, complain, flush, notes, say
from convtap._errors import ConvtapError
from convtap._result.origin import own_version


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    The status is 0, or 1 if a check of the command failed, or 2 if the command itself failed.
    """
    with any_encoding(), own_path():
        try:
            args = _parsed(argv)
            with notes():
                status = int(args.run(args))
            flush()
            return status
        except ConvtapError as error:
            complain(f"convtap: {error}")
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            complain(f"convtap: a file cannot be read or written: {error.strerror or error}{where}. Check its folder.")
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception:  # Python would exit with status 1, which means that a check failed
            complain("convtap: this error is a bug in convtap. Report it together with the lines below.")
            traceback.print_exc()
        return TROUBLE


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        hint = "Run convtap --help for the commands."
        if getattr(args, "input", None) and any(os.path.exists(text) for text in rest):
            hint = "For several inputs pass a folder, a pattern in quotes (--input '*.wav'), or --input several times."
        parser.exit(TROUBLE, f"convtap: unknown arguments: {' '.join(rest)}. {hint}\n")
    return args


class _Parser(argparse.ArgumentParser):
    """A parser that prints an error as one line, like the commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(TROUBLE, f"{self.prog}: {message}. Run {self.prog} --help for an example.\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            complain(message)
        raise SystemExit(status)

    def print_help(self, file: Any = None) -> None:
        say(self.format_help().rstrip("\n"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="convtap",
        description="Captures the outputs of the 1-D convolutions of PyTorch models.",
        epilog=MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"convtap {own_version()}", help="print the version and exit"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="capture five Conv1d layers and an audio encoder",
        description="Captures five Conv1d layers on ECG-like inputs, and an audio encoder on a sound file.",
        epilog="example: convtap demo speech.wav --out outputs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("sound", nargs="?", metavar="FILE.wav", help="a sound file (default: a short recording)")
    demo.add_argument(
        "--out", type=Path, default=Path("convtap-demo"), help="folder for the outputs (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    add_commands(commands)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from convtap._cli import demo

    for line in demo.run(args.out, args.sound):
        say(line)
    return SAME
