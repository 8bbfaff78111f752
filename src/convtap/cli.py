"""The command line: ``convtap demo``, and what else a terminal is good for."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from convtap._cli.commands import add_commands
from convtap._errors import ConvtapError


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, or 2 after one line on standard error for a user's mistake."""
    try:
        args = _parser().parse_args(argv)
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except ConvtapError as error:
        print(f"convtap: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130  # what shells give for Ctrl-C


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. {self.prog} --help shows an example.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convtap", description="Taps the 1-D convolutions of PyTorch models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="five Conv1d layers and an audio encoder, tapped",
        description="Shows the outputs of five Conv1d layers for each input, and of an audio encoder on a sound file.",
        epilog="example: convtap demo speech.wav --out outputs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("sound", nargs="?", metavar="FILE.wav", help="your own sound (default: a short recording)")
    demo.add_argument("--out", type=Path, default=Path("convtap-demo"), help="folder for the outputs (%(default)s)")
    demo.set_defaults(run=_demo)
    add_commands(commands)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from convtap._cli import demo as _demo

    print("\n".join(_demo.run(args.out, args.sound)))
    return 0
