"""The command line: ``convtap demo``, and what else a terminal is good for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convtap._errors import ConvtapError


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, or 2 after one line on standard error for a user's mistake."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConvtapError as error:
        print(f"convtap: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convtap", description="Taps the 1-D convolutions of PyTorch models.")
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
    return parser


def _demo(args: argparse.Namespace) -> int:
    from convtap import _demo

    print("\n".join(_demo.run(args.out, args.sound)))
    return 0
