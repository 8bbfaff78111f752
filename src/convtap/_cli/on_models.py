"""Implements the commands that run a model: layers, run and stats."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from convtap._capture.capture import capture
from convtap._capture.list_layers import list_layers
from convtap._capture.options import check_every
from convtap._capture.statistics import statistics
from convtap._cli import run_folder
from convtap._cli.exit_status import DIFFERS, SAME
from convtap._cli.inputs import Given, call_error, find_files, mixed_rates, read_example, read_inputs
from convtap._cli.model import load_model, on_device, types_of
from convtap._cli.on_files import show
from convtap._cli.pictures import drawing, figures_of, write_figures, write_picture, write_report
from convtap._cli.run_folder import PICTURE, REPORT, Run
from convtap._cli.saved import STATISTICS
from convtap._cli.terminal import Progress, complain, say
from convtap._cli.user_code import run_user_code, told
from convtap._debug.finite import finite
from convtap._errors import ConvtapError, InvalidType, InvalidValue
from convtap._result.activations import Activations
from convtap._result.file import check_path
from convtap._select.example import fitted, run_once
from convtap._time.timeline import timeline
from convtap._view.draw import need_matplotlib

_NO_INPUT = (
    "the input is missing. Pass --input x.npy (or a sound file or a .pt file), or --shape 1,1,16000 for random numbers"
)


def run_layers(args: argparse.Namespace) -> int:
    """Prints the layers that a selection matches, and their use in an example."""
    given = None if args.example is None else read_example(args.example)
    model = on_device(load_model(args.model), args.device)
    kinds = types_of(args.types, model)
    if given is None:
        found = list_layers(model, args.layers, **kinds)
    else:
        found = _on(given, model, lambda example: list_layers(model, args.layers, **kinds, example=example))
    show(found, args)
    return SAME


def run_run(args: argparse.Namespace) -> int:
    """Runs a model and writes the outputs of its layers into a folder."""
    inputs = _Inputs(args)
    if args.plot:
        need_matplotlib()
    check_path(args.out)
    run_folder.check_folder(args.out)
    model = on_device(load_model(args.model), args.device)
    kinds = types_of(args.types, model)
    with inputs.bar(3 + args.plot + args.report) as bar, ExitStack() as stack:
        found = stack.enter_context(finite(model, raise_at="never")) if args.finite else None
        with capture(model, args.layers, **kinds, at=args.at, offload=_offload(args)) as acts:
            run = Run()
            for number, given in enumerate(inputs.read(bar)):
                with bar.step(f"running {given.name}"):
                    _on(given, model, lambda example: run_once(model, example))
                signal = run_folder.signal_in(given.example)
                if signal is not None:
                    run.signals[number] = signal
        stack.close()
        with bar.step("following the time axis"):
            run.about = run_folder.described(args.model, model, _options(args), inputs.done)
            run.about["timeline"] = _times(model, inputs.first, acts, args)
        files = _write(args, acts, run, model, bar)
    show(acts, args, stats=True)
    for path in files:
        say(f"wrote {path}")
    if found is None:
        return SAME
    say(found.first or "no NaN or Inf")
    return SAME if found.first is None else DIFFERS


def run_stats(args: argparse.Namespace) -> int:
    """Prints and saves statistics of the outputs of a model's layers over all inputs."""
    inputs = _Inputs(args)
    if args.plot is not None:
        need_matplotlib()
    target = None if args.out is None else args.out / STATISTICS if args.out.is_dir() else args.out
    if target is not None:
        check_path(target)
    for path in (target, args.plot):
        if path is not None:
            run_folder.check_folder(path.parent)
    model = on_device(load_model(args.model), args.device)
    kinds = types_of(args.types, model)
    with inputs.bar(1) as bar:
        with statistics(model, args.layers, **kinds, at=args.at) as stats:
            for given in inputs.read(bar):
                with bar.step(f"running {given.name}"):
                    _on(given, model, lambda example: run_once(model, example))
        with bar.step("writing"):
            if target is not None:
                run_folder.make_folder(target.parent)
                stats.save(target)
            if args.plot is not None:
                run_folder.make_folder(args.plot.parent)
                write_picture(args.plot, stats.plot())
    show(stats, args)
    for path in (target, args.plot):
        if path is not None:
            say(f"wrote {path}")
    return SAME


class _Inputs:
    """The inputs of a command.

    Attributes:
        done: a description of each input that has run, without its values.
        first: the first input.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if not args.input and args.shape is None:
            raise InvalidValue(_NO_INPUT)
        self._args = args
        self._every = check_every(args.every)
        if args.batch_size is not None and args.batch_size < 1:
            raise InvalidValue(f"--batch-size {args.batch_size} is less than 1. Write for example --batch-size 32")
        if args.sample_rate is not None and not args.sample_rate > 0:
            raise InvalidValue(
                f"--sample-rate {args.sample_rate:g} is not a positive number. Write for example --sample-rate 250"
            )
        self._files = find_files(args.input or ())
        self.done: list[dict[str, Any]] = []
        self.first: Given | None = None

    def bar(self, more: int) -> Progress:
        """Returns a progress bar over the inputs and ``more`` other steps."""
        return Progress(more + (max(1, len(self._files)) - 1) // self._every)

    def read(self, bar: Progress) -> Iterator[Given]:
        """Yields the inputs to run, one at a time."""
        args, number = self._args, 0
        for parts in read_inputs(self._files, args.shape, args.sample_rate, args.batch_size):
            for place, given in enumerate(parts):
                if number % self._every == 0:
                    bar.add(place > 0)
                    self.first = self.first or given
                    self.done.append(given.about)
                    yield given
                number += 1
        note = mixed_rates([one["sample_rate"] for one in self.done])
        if note:
            complain(f"note: {note}")


def _offload(args: argparse.Namespace) -> str | None:
    """Returns the device to offload to, so that the outputs of many inputs fit."""
    return None if args.device in (None, "cpu") else "cpu"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that affect the capture, as the user wrote them."""
    found = {"layers": args.layers, "types": args.types, "at": args.at, "every": args.every, "device": args.device}
    shown = {key: ",".join(value) if isinstance(value, list) else value for key, value in found.items()}
    return {key: value for key, value in shown.items() if value not in (None, "output", 1)}


def _times(model: nn.Module, given: Given | None, acts: Activations, args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the places of the layers' frames in time, or None if they are unknown."""
    if given is None or args.at == "input":  # a timeline describes outputs
        return None
    try:
        found = timeline(model, fitted(given.example, model), time_dim=args.time_dim)
        return run_folder.saved_times(found, acts)
    except Exception as error:  # the run itself has succeeded, and the time axis is optional
        reason = str(error) if isinstance(error, ConvtapError) else told(error)
        complain(f"note: the pictures have no common time axis: {reason}")
        return None


def _write(args: argparse.Namespace, acts: Activations, run: Run, model: nn.Module, bar: Progress) -> list[Path]:
    """Writes the files of a run, and returns their paths."""
    with bar.step("writing"):
        files = run_folder.write(args.out, acts, run)
    options = drawing(acts, run, 0)
    for command, name, asked in (("plot", PICTURE, args.plot), ("report", REPORT, args.report)):
        path = args.out / name
        if not asked:
            if path.exists():
                complain(f"note: {path} is from an earlier run. Write it again: convtap {command} {args.out}")
            continue
        with bar.step(f"drawing {name}"):
            if name == PICTURE:
                files += write_figures(path, figures_of(acts, options))
            else:
                files.append(write_report(path, acts, model, options))
    return files


def _on(given: Given, model: nn.Module, function: Callable[[Any], Any]) -> Any:
    """Calls a function with one input, on the model's device and in its type."""
    what, fix = call_error(given)
    try:
        return run_user_code(what, function, fitted(given.example, model), fix=fix)
    except InvalidType as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        raise InvalidValue(
            f"{what}: {told(error.__cause__)}. Save all arguments by name: torch.save({{'x': x, 'mask': mask}}, 'x.pt')"
        ) from error
