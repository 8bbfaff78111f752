"""Defines the commands and their options, with the text of ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convtap._cli import on_files, on_models
from convtap._cli.pictures import add_picture_options, parse_span
from convtap._table import MOST

_MODEL = (
    "mynet:build, pkg.mynet:build or folder/mynet.py:build. The name after the colon is a function that returns the model "
    "(called with random seed 0), a class, or the model itself"
)
_SAVED = "a folder written by convtap run, a file written by acts.save"


def add_commands(commands: Any) -> None:
    """Adds the commands to the subparsers of a parser.

    Each command sets ``run``, a function that takes the arguments and returns the exit status.
    """
    _add_layers(commands)
    _add_run(commands)
    _add_stats(commands)
    _add_drawing(commands)
    _add_info(commands)
    _add_comparing(commands)


def _add_layers(commands: Any) -> None:
    layers = _command(
        commands,
        "layers",
        on_models.run_layers,
        "list the layers that a selection matches",
        "convtap layers mynet:build --example 1,1,16000",
    )
    layers.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_selection(layers)
    layers.add_argument(
        "--example",
        metavar="SHAPE|FILE",
        help="run the model once on this input, and show how each layer is used, its shape and its bytes",
    )
    _add_all(layers)


def _add_run(commands: Any) -> None:
    run = _command(
        commands,
        "run",
        on_models.run_run,
        "run a model and save the outputs of its layers",
        "convtap run mynet:build --input speech.wav --layers 'encoder.*' --out outputs --report",
    )
    run.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_inputs(run)
    _add_selection(run)
    _add_point(run)
    run.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for the files that are written")
    run.add_argument("--plot", action="store_true", help="also draw activations.png, a picture of the first input")
    run.add_argument("--report", action="store_true", help="also write report.html, with pictures of the first input")
    run.add_argument("--time-dim", type=int, default=-1, metavar="AXIS", help="the time axis of an input (default: -1)")
    run.add_argument(
        "--finite",
        action="store_true",
        help="name the first layer that produces NaN or Inf; the exit status is 1 if one does",
    )
    _add_all(run)


def _add_stats(commands: Any) -> None:
    stats = _command(
        commands,
        "stats",
        on_models.run_stats,
        "collect statistics of the outputs of a model's layers over all inputs",
        "convtap stats mynet:build --input recordings/ --out stats.safetensors",
    )
    stats.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_inputs(stats)
    _add_selection(stats)
    _add_point(stats)
    stats.add_argument("--out", type=Path, metavar="FILE", help="save the statistics, for compare, plot and info")
    stats.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the statistics")
    _add_all(stats)


def _add_drawing(commands: Any) -> None:
    plot = _command(
        commands,
        "plot",
        on_files.run_plot,
        "draw the saved outputs of layers for one input",
        "convtap plot outputs --sample 0 --out maps.png",
    )
    report = _command(
        commands,
        "report",
        on_files.run_report,
        "write an HTML report of saved outputs",
        "convtap report outputs --model mynet:build --out report.html",
    )
    for parser, where in ((plot, ", saved statistics or a store"), (report, " or a store")):
        parser.add_argument("path", metavar="PATH", help=_SAVED + where)
        add_picture_options(parser)
    plot.add_argument(
        "--span",
        type=parse_span,
        metavar="START:STOP",
        help="the part of the input to show, in seconds (in samples if the sample rate is unknown)",
    )
    plot.add_argument("--pages", action="store_true", help="write an index and numbered pages, for many layers")
    plot.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="the picture to write, also .pdf or .svg (default: a file in the folder)",
    )
    report.add_argument("--model", metavar="MODEL", help="the model as in convtap run, to show its whole layer tree")
    report.add_argument("--title", help="the heading of the page (default: the model's class)")
    report.add_argument("--notes", help="free text below the heading")
    report.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the page to write (default: a file in the folder)"
    )


def _add_info(commands: Any) -> None:
    info = _command(
        commands,
        "info",
        on_files.run_info,
        "show the contents of a file, the folder of a run, or a store",
        "convtap info outputs",
    )
    info.add_argument("path", metavar="PATH", help=f"{_SAVED}, saved statistics or a store")
    info.add_argument(
        "--stats", action="store_true", help="for outputs, also show the range of their values, and NaN and Inf"
    )
    _add_all(info)


def _add_comparing(commands: Any) -> None:
    compare = _command(
        commands,
        "compare",
        on_files.run_compare,
        "compare two saved captures or statistics; the exit status is 1 if the captures differ",
        "convtap compare before after --sqnr 40",
    )
    compare.add_argument("a", metavar="A", help=f"the reference: {_SAVED} or saved statistics")
    compare.add_argument("b", metavar="B", help="the capture or statistics to compare with it, of the same kind")
    compare.add_argument("--atol", type=float, help="require |a - b| <= atol + rtol * |a| for every element")
    compare.add_argument("--rtol", type=float, help="see --atol")
    compare.add_argument("--sqnr", type=float, metavar="DB", help="require this signal to quantization noise ratio")
    _add_all(compare)
    verify = _command(
        commands,
        "verify",
        on_files.run_verify,
        "read a whole store and compare its checksums; the exit status is 1 if a shard is bad",
        "convtap verify outputs",
    )
    verify.add_argument("path", metavar="STORE", help="the store's folder")
    _add_all(verify)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        metavar="FILE",
        help="a .npy file, a sound file such as .wav (passed as (1, channels, samples)) or a .pt file; a folder of such "
        "files, or a quoted pattern such as 'day1/*.wav'. Each file is one forward pass. May be repeated",
    )
    parser.add_argument(
        "--shape",
        metavar="SHAPE",
        help="without --input: random numbers of this shape; with --input: reshape each input",
    )
    parser.add_argument(
        "--sample-rate",
        type=float,
        metavar="HZ",
        help="samples per second of the input (sound files contain their own rate)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="split each input into passes of N rows")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run only inputs 0, N, 2N, ...")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        action="append",
        metavar="NAME",
        help="a layer's name or a glob; may be repeated (default: all layers of --types)",
    )
    parser.add_argument(
        "--types",
        action="append",
        metavar="TYPE",
        help="module types to choose from, such as Conv1d,ReLU, or a class that the model uses (default: Conv1d)",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="the device to move the model to: cpu, cuda, cuda:1 or mps (default: the model is not moved)",
    )


def _add_point(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at",
        choices=("output", "input", "activation"),
        default="output",
        help="capture the layers' outputs (default), their inputs, or the outputs of the activations that follow them",
    )


def _add_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help=f"print all rows of a table (default: {MOST} rows)")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser
