"""Writes pictures and reports for the command line."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

from torch import nn

from convtap._atomic_write import write_whole
from convtap._cli.run_folder import Run
from convtap._errors import InvalidValue, StoreError, Unsupported, one_line
from convtap._result.activations import Activations
from convtap._result.file import unwritable
from convtap.plot import pages


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that pictures and reports share."""
    parser.add_argument(
        "--sample", metavar="N", help="the input, counted from 0, or a sample's id in a store (default: the first)"
    )
    parser.add_argument("--layers", action="append", metavar="NAME", help="a name, key or glob; may be repeated")
    parser.add_argument(
        "--channels", type=int, default=64, metavar="N", help="maximum number of rows of a map (default: %(default)s)"
    )
    parser.add_argument("--channels-last", action="store_true", help="the outputs are (B, T, C)")


def parse_span(text: str) -> tuple[float, float]:
    """Parses the option ``--span``, two numbers separated by a colon.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    start, _, stop = text.partition(":")
    try:
        return float(start), float(stop)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span. Write its start and stop: --span 1.5:3") from None


def drawing(acts: Activations, run: Run, sample: int, args: argparse.Namespace | None = None) -> dict[str, Any]:
    """Returns the arguments that ``acts.plot`` and ``acts.report`` share."""
    found: dict[str, Any] = {"sample": sample, **run.drawn(acts, sample)}
    if args is not None:
        found.update(layers=args.layers, channels=args.channels, channels_last=True if args.channels_last else None)
    return found


def figures_of(acts: Activations, options: dict[str, Any], in_pages: bool = False) -> list[Any]:
    """Draws one figure, or pages if asked for or if the outputs do not fit."""
    if not in_pages:
        with contextlib.suppress(Unsupported):  # too many outputs for an index on one page
            return [acts.plot(**options)]
    return pages(acts, **options)


def write_figures(path: Path, figures: list[Any]) -> list[Path]:
    """Writes one figure, or several as ``maps-0.png`` (the index), ``maps-1.png``."""
    numbered = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(len(figures))]
    paths = [path] if len(figures) == 1 else numbered
    return [write_picture(one, figure) for one, figure in zip(paths, figures, strict=True)]


def write_picture(path: Path, figure: Any) -> Path:
    """Writes a figure in the format of the file's suffix.

    Raises:
        InvalidValue: matplotlib does not support the format.
        StoreError: the file cannot be written.
    """
    content = io.BytesIO()
    kind = path.suffix.removeprefix(".") or "png"
    try:
        figure.savefig(content, format=kind, bbox_inches="tight")
    except ValueError as error:
        if kind in figure.canvas.get_supported_filetypes():
            raise
        raise InvalidValue(f"{str(path)!r} cannot be written: {one_line(error)}. Write --out maps.png") from None
    try:
        write_whole(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    except OSError as error:
        raise StoreError(unwritable(path, error)) from error
    return path


def write_report(path: Path, acts: Activations, model: nn.Module | None, options: dict[str, Any]) -> Path:
    """Writes the report of a capture.

    Raises:
        StoreError: the file cannot be written.
    """
    acts.report(path, model, **options)
    return path
