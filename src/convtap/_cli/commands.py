"""The commands on a model or on files: ``layers``, ``run``, ``compare``, ``info`` and ``verify``."""

from __future__ import annotations

import argparse
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from convtap._capture.capture import capture
from convtap._capture.list_layers import list_layers
from convtap._cli.model_and_input import load_model, random_input, read_input
from convtap._debug.compare import compare
from convtap._debug.finite import finite
from convtap._errors import ConvtapError, CoverageWarning, InvalidValue, StoreError, one_line
from convtap._result.activations import Activations
from convtap._result.load import load
from convtap._select.example import fitted, run_once
from convtap._table import MOST

#: The exit statuses of the commands.
GOOD, DIVERGED = 0, 1

_MODEL = "pkg.module:factory: a function that returns the model (called with random seed 0), or the model itself"


def add_commands(commands: Any) -> None:
    """Adds the commands to the subparsers of a parser. Each sets ``run``, a function of the arguments to the exit status."""
    layers = _command(
        commands,
        "layers",
        _layers,
        "which layers a selection selects",
        "convtap layers mynet:build --example 1,1,16000",
    )
    layers.add_argument("model", help=_MODEL)
    layers.add_argument(
        "--layers", action="append", metavar="NAME", help="a name or glob; may be repeated (default: all)"
    )
    layers.add_argument(
        "--example", metavar="SHAPE|FILE", help="run once on it, and show how each layer is used, shapes and bytes"
    )
    _add_run(commands)
    diff = _command(
        commands,
        "compare",
        _compare,
        "two saved captures side by side; exit status 1 if they diverge",
        "convtap compare before/activations.safetensors after/activations.safetensors --sqnr 40",
    )
    diff.add_argument(
        "a", metavar="A", help="the reference: a file of acts.save or convtap run, or the folder that has it"
    )
    diff.add_argument("b", metavar="B", help="what to compare with it")
    diff.add_argument("--atol", type=float, help="every element must have |a - b| <= atol + rtol * |a|")
    diff.add_argument("--rtol", type=float, help="see --atol")
    diff.add_argument("--sqnr", type=float, metavar="DB", help="the least signal to quantization noise ratio")
    for name, run, text in (
        ("info", _info, "what a store of extracted outputs holds"),
        ("verify", _verify, "read a whole store and compare its checksums; exit status 1 if a shard is bad"),
    ):
        _command(commands, name, run, text, f"convtap {name} outputs").add_argument("store", help="the store's folder")


def _add_run(commands: Any) -> None:
    run = _command(
        commands,
        "run",
        _run,
        "run a model once, and save the outputs of its layers",
        "convtap run mynet:build --input speech.wav --layers 'encoder.*' --out outputs --report",
    )
    run.add_argument("model", help=_MODEL)
    run.add_argument("--input", metavar="FILE", help="a .npy, .wav (given as (1, channels, samples)) or .pt file")
    run.add_argument(
        "--shape", metavar="SHAPE", help="without --input: random numbers of this shape; with it: reshape what it holds"
    )
    run.add_argument("--layers", action="append", metavar="NAME", help="a name or glob; may be repeated (default: all)")
    run.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for activations.safetensors")
    run.add_argument("--plot", action="store_true", help="also draw activations.png")
    run.add_argument("--report", action="store_true", help="also write report.html")
    run.add_argument(
        "--finite", action="store_true", help="name the first layer that makes NaN or Inf; exit status 1 if one does"
    )


def _command(commands: Any, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help=f"print all rows of a table, not only {MOST} of them")
    parser.set_defaults(run=run)
    return parser


def _layers(args: argparse.Namespace) -> int:
    model = load_model(args.model)
    example = None
    if args.example is not None:
        example = fitted(_read(args.example), model)
    _show(_called(list_layers, model, args.layers, example=example), args)
    return GOOD


def _run(args: argparse.Namespace) -> int:
    if args.input is None and args.shape is None:
        raise InvalidValue(
            "there is no input. Give --input x.npy (or .wav, .pt), or --shape 1,1,16000 for random numbers"
        )
    model = load_model(args.model)
    example = random_input(args.shape) if args.input is None else read_input(args.input, args.shape)
    with warnings.catch_warnings(record=True) as notes, ExitStack() as stack:
        warnings.simplefilter("always", CoverageWarning)
        found = stack.enter_context(finite(model, raise_at="never")) if args.finite else None
        acts = stack.enter_context(capture(model, args.layers))
        _called(run_once, model, fitted(example, model))
    for line in [*_written(acts, args, model), *(f"note: {note.message}" for note in notes)]:
        print(line)
    if found is None:
        return GOOD
    print(found.first or "no NaN or Inf")
    return GOOD if found.first is None else DIVERGED


def _written(acts: Activations, args: argparse.Namespace, model: Any) -> list[str]:
    """Writes what is asked for, and returns what to print."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {str(args.out)!r}: {error.strerror or error}.") from error
    files = [args.out / "activations.safetensors"]
    acts.save(files[0])
    if args.plot:
        files.append(args.out / "activations.png")
        acts.plot().savefig(files[-1], bbox_inches="tight")
    if args.report:
        files.append(args.out / "report.html")
        acts.report(files[-1], model)
    table = acts.summary(stats=True, rows=None if args.all else MOST)
    table.whole = "--all"
    return [str(table), *(f"wrote {path}" for path in files)]


def _compare(args: argparse.Namespace) -> int:
    a, b = (load(path / "activations.safetensors" if path.is_dir() else path) for path in map(Path, (args.a, args.b)))
    found = compare(a, b, atol=args.atol, rtol=args.rtol, sqnr_db=args.sqnr)
    _show(found, args)
    return GOOD if found.agrees else DIVERGED


def _info(args: argparse.Namespace) -> int:
    from convtap._dataset.store import Store

    store = Store(args.store)
    print(store.summary(rows=None) if args.all else store)
    return GOOD


def _verify(args: argparse.Namespace) -> int:
    from convtap._dataset.store import Store

    bad = Store(args.store).verify()
    if args.all and len(bad):
        bad = bad.summary(rows=None)
    print(bad if len(bad) else f"{args.store}: every shard is as it was written")
    return DIVERGED if len(bad) else GOOD


def _show(found: Any, args: argparse.Namespace) -> None:
    """Prints what has a table: its first and last rows, or with ``--all`` every one."""
    table = found.summary(rows=None if args.all else MOST)
    table.whole = "--all"
    print(table)


def _read(text: str) -> Any:
    """An example: a file if it has the name of one, else a shape."""
    return read_input(text) if Path(text).suffix else random_input(text)


def _called(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function that runs the user's model, whose errors become one line."""
    try:
        return function(*args, **kwargs)
    except ConvtapError:
        raise
    except Exception as error:
        raise InvalidValue(
            f"the model fails on this input: {type(error).__name__}: {one_line(error)}. Does it take this shape?"
        ) from error
