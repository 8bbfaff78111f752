"""Implements the commands on files: plot, report, info, compare and verify."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convtap._cli.exit_status import DIFFERS, SAME
from convtap._cli.model import load_model
from convtap._cli.pictures import drawing, figures_of, write_figures, write_report
from convtap._cli.run_folder import OUTPUTS, PICTURE, REPORT, Run
from convtap._cli.saved import Saved, activations_of, open_saved
from convtap._cli.terminal import Progress, complain, say
from convtap._dataset.progress_bar import is_watched
from convtap._debug.compare import compare
from convtap._errors import InvalidValue
from convtap._table import MOST
from convtap._view.draw import need_matplotlib


def show(found: Any, args: argparse.Namespace, **options: Any) -> None:
    """Prints the first and last rows of a table, or all rows with ``--all``."""
    table = found.summary(rows=None if args.all else MOST, **options)
    table.whole = "--all"
    say(table)


def run_plot(args: argparse.Namespace) -> int:
    """Draws the outputs or statistics at a path."""
    need_matplotlib()
    with Progress(2) as bar:
        with bar.step("reading"):
            saved = open_saved(args.path)
        target = args.out or _beside(saved, PICTURE, ".png")
        with bar.step("drawing"):
            targets = write_figures(target, _figures(saved, args))
    for path in targets:
        say(f"wrote {path}")
    return SAME


def _figures(saved: Saved, args: argparse.Namespace) -> list[Any]:
    if saved.stats is not None:
        for name in ("sample", "span", "pages", "channels_last"):
            if getattr(args, name) not in (None, False):
                option = name.replace("_", "-")
                raise InvalidValue(f"--{option} does not apply to statistics, which have no inputs. Remove --{option}.")
        return [saved.stats.plot(args.layers)]
    acts, number, which = activations_of(saved, args.sample)
    _note(which)
    options = {**drawing(acts, saved.run, number, args), "span": args.span}
    return figures_of(acts, options, args.pages)


def run_report(args: argparse.Namespace) -> int:
    """Writes the report of the outputs at a path."""
    with Progress(2) as bar:
        with bar.step("reading"):
            model = None if args.model is None else load_model(args.model)
            saved = open_saved(args.path)
        target = args.out or _beside(saved, REPORT, ".html")
        with bar.step("writing the report"):
            acts, number, which = activations_of(saved, args.sample)
            _note(which)
            options = {**drawing(acts, saved.run, number, args), "title": args.title, "notes": args.notes}
            write_report(target, acts, model, options)
    say(f"wrote {target}")
    return SAME


def run_info(args: argparse.Namespace) -> int:
    """Prints the contents of a path."""
    saved = open_saved(args.path)
    if args.stats and saved.acts is None:
        raise InvalidValue(
            f"--stats applies only to the outputs of a run, and {args.path!r} is {saved.kind}. Remove --stats."
        )
    if saved.store is not None:
        show(saved.store, args)
    elif saved.stats is not None:
        show(saved.stats, args)
    else:
        for line in _of_run(saved.run):
            say(line)
        show(saved.acts, args, stats=args.stats)
    return SAME


def run_compare(args: argparse.Namespace) -> int:
    """Compares the outputs or statistics at two paths."""
    a, b = open_saved(args.a), open_saved(args.b)
    if a.kind != b.kind or a.store is not None:
        raise InvalidValue(
            f"{args.a!r} is {a.kind}, and {args.b!r} is {b.kind}. Pass two captures (written by convtap run or acts.save), or "
            "two statistics (written by convtap stats)."
        )
    sides: Any = (a.acts, b.acts) if a.stats is None else (a.stats, b.stats)
    found: Any = compare(*sides, atol=args.atol, rtol=args.rtol, sqnr_db=args.sqnr)
    show(found, args)
    return SAME if getattr(found, "agrees", True) else DIFFERS


def run_verify(args: argparse.Namespace) -> int:
    """Compares the shards of a store with their checksums."""
    from convtap._dataset.store import Store

    bad = Store(args.path).verify(progress=is_watched())
    if len(bad):
        show(bad, args)
        return DIFFERS
    say(f"{args.path}: the checksums of all shards match")
    return SAME


def _beside(saved: Saved, name: str, suffix: str) -> Path:
    """Returns the file to write without ``--out``.

    It lies in the folder of the run or beside the saved file. For a store it lies in the current folder.
    """
    if saved.store is not None:
        return Path(f"{saved.path.name or 'store'}{suffix}")  # a store's folder holds only the store
    return saved.path.with_name(name) if saved.path.name == OUTPUTS else saved.path.with_suffix(suffix)


def _note(text: str) -> None:
    if text:
        complain(f"note: {text}")


def _of_run(run: Run) -> list[str]:
    """Returns the lines that describe the run, if ``convtap run`` wrote the outputs."""
    if not run.about:
        return []
    about = run.about
    options = "".join(f" --{key} {value}" for key, value in about["options"].items())
    lines = [
        f"{about['class']} of {about['model']}{options}",
        f"{about['date']}, convtap {about['convtap']}, torch {about['torch']}",
    ]
    for number, one in enumerate(about["inputs"][:MOST]):
        rate = "" if one["sample_rate"] is None else f", {one['sample_rate']:g} samples per second"
        lines.append(f"input {number}: {one['name']}, {one['described']}{rate}")
    return [*lines, ""]
