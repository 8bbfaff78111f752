"""The result of ``finite``: which module produced a NaN or an Inf, and where."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from convtap._debug.probe import Probe, Range, finite_range, probe, read_all
from convtap._errors import listed, plural
from convtap._public import public
from convtap._select.layer_layout import layout_of
from convtap._spelling import printable
from convtap._tensors.layout import axes_of
from convtap._tensors.statistics import dtype_text


@dataclass(eq=False, slots=True)
class ModuleRun:
    """One run of a watched module.

    Attributes:
        parent: the watched run around it, or None.
        index: the number of earlier runs of the module; -1 if they are not counted.
        last: the name of its submodule that returned last.
        inputs: the probes of its inputs.
        method: the method that runs, if it is not ``forward``. Its arguments are not probed.
        before: the name of the layer that ran before it, if code outside of the model calls the layers.
    """

    name: str
    module: nn.Module
    parent: ModuleRun | None = None
    index: int = -1
    forward: int = -1
    last: str | None = None
    inputs: list[Probe] = field(default_factory=list)
    method: str = ""
    before: str | None = None

    def is_inside(self, other: ModuleRun) -> bool:
        """Returns whether this run is part of another one."""
        run = self.parent
        while run is not None and run is not other:
            run = run.parent
        return run is other


@dataclass(eq=False, slots=True)
class SeenTensor:
    """A tensor that passes between modules.

    ``sources`` are the runs that returned it, and ``targets`` are the runs that took it as input.
    """

    reference: weakref.ref[Tensor]
    version: int
    found: Probe | None
    sources: list[ModuleRun] = field(default_factory=list)
    targets: list[ModuleRun] = field(default_factory=list)
    listened: bool = False

    def innermost_targets(self) -> list[ModuleRun]:
        """Returns the runs that took the tensor, without runs around another of them."""
        return [run for run in self.targets if not any(other.is_inside(run) for other in self.targets)]


@dataclass
class Event:
    """A tensor that may hold NaN or Inf, with the place where it was seen."""

    where: str
    found: Probe
    run: ModuleRun | None = None
    seen: SeenTensor | None = None
    parameter: str = ""


@public
@dataclass(frozen=True)
class Finding:
    """The first NaN or Inf that ``finite`` found. Print it for a description.

    Attributes:
        layer: the name of the module that produced it. If the model did not produce it, the outermost module.
        type: the class of that module.
        where: ``"output"`` for the module's output, ``"code"`` for a tensor that the module's own forward made between two
            of its submodules, ``"input"`` for the model's input, ``"gradient"`` for a gradient that the module's backward
            made, or ``"loss"`` for the gradient that the loss passed to the model's output.
        what: ``"NaN"``, ``"Inf"`` or ``"-Inf"``.
        index: the number of earlier runs of the module inside this ``finite``.
        forward: the number of the forward pass.
        position: the index of a bad element, such as (sample, channel, time), or None if it is not known.
        count: the number of bad elements, or None if they were not counted (on an accelerator).
        shape: the shape of the tensor that holds them.
        dtype: the type of that tensor.
        inputs: the ranges of the module's inputs: their finite values, and the counts of NaN and Inf.
        weights: the ranges of the module's own parameters and buffers.
        message: the description.
    """

    layer: str
    type: str
    where: str
    what: str
    index: int
    forward: int
    position: tuple[int, ...] | None
    count: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: list[Range] = field(default_factory=list)
    weights: list[Range] = field(default_factory=list)
    message: str = field(default="", repr=False)

    def __str__(self) -> str:
        return printable(self.message)


def judge(event: Event, hint: str) -> Finding:
    """Finds the module that produced the tensor of the first bad event.

    See Note: [The first bad tensor].

    Args:
        event: the event.
        hint: a sentence about modules that were not watched, or an empty string.
    """
    found = event.found
    if event.where == "gradient":
        where, run, cause = _gradient_cause(event)
    else:
        where, run, cause = _forward_cause(event)
    weights, spoilt = _weights(run.module)
    inputs = [taken.range() for taken in run.inputs]
    call = "" if run.index < 0 else f" (call {run.index}, forward pass {run.forward})"
    method = f".{run.method}" if run.method else ""
    layer = f"{run.name!r} ({type(run.module).__name__}{method}){call}"
    sentences = [f"{cause.format(layer=layer, what=found.kind)}: {_place(found, run, where)}."]
    if where != "input":
        sentences += _ranges(inputs, weights, spoilt)
    if found.kind == "-Inf":
        sentences.append("If it belongs to a mask, pass inf=False.")
    return Finding(
        layer=run.name,
        type=type(run.module).__name__,
        where=where,
        what=found.kind,
        index=run.index,
        forward=run.forward,
        position=found.position(),
        count=found.count,
        shape=found.shape,
        dtype=found.dtype,
        inputs=inputs,
        weights=weights,
        message=" ".join([*sentences, hint]).rstrip(),
    )


def _ranges(inputs: list[Range], weights: list[Range], spoilt: list[str]) -> list[str]:
    """Describes the ranges of a module's inputs and weights, and its bad weights."""
    ranges = [f"its input: {listed(map(str, inputs))}"] if inputs else []
    ranges += [f"its {weight}" for weight in weights]
    text = f"{listed(ranges)}."
    found = [text[0].upper() + text[1:]] if ranges else []
    return found + ([f"The cause: its {listed(spoilt)} already holds NaN or Inf."] if spoilt else [])


def _forward_cause(event: Event) -> tuple[str, ModuleRun, str]:
    run = event.run
    assert run is not None
    if event.where == "output":
        after = "" if run.last is None else f", in its own code after {run.last!r}"
        return "output", run, f"{{layer}} produces {{what}} from finite inputs{after}"
    if run.parent is None or (run.parent.method and run.parent.last is None):
        when = "before any layer ran" if run.before is None else f"but the output of {run.before!r} before it is finite"
        return "input", run, f"the input of {{layer}} already holds {{what}}, {when}"
    after = "" if run.parent.last is None else f"after {run.parent.last!r} and "
    return "code", run.parent, f"{{layer}} produces {{what}} in its own code, {after}before {run.name!r}"


def _gradient_cause(event: Event) -> tuple[str, ModuleRun, str]:
    if event.parameter:
        assert event.run is not None
        cause = f"the backward pass of {{layer}} produces {{what}} in the gradient of its {event.parameter}"
        return "gradient", event.run, cause
    assert event.seen is not None
    takers = event.seen.innermost_targets()
    if takers:
        others = [repr(run.name) for run in takers[:-1]]
        either = f" (or of {listed(others)}, which took the same tensor)" if others else ""
        return (
            "gradient",
            takers[-1],
            f"the backward pass of {{layer}}{either} produces {{what}} in the gradient of its input",
        )
    source = event.seen.sources[0]
    outermost = event.seen.sources[-1]
    if outermost.parent is None:
        return "loss", outermost, "the loss produces {what} in the gradient of the output of {layer}"
    inside = outermost.parent
    return (
        "gradient",
        inside,
        f"the backward pass of {{layer}} produces {{what}} in its own code, after {source.name!r}",
    )


def _weights(module: nn.Module) -> tuple[list[Range], list[str]]:
    """Returns the ranges of a module's own parameters and buffers, and the bad names."""
    ranges, spoilt = [], []
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None or isinstance(tensor, nn.parameter.UninitializedParameter):
            continue
        found = probe(tensor, name)
        if found is not None:
            read_all([found])
            ranges.append(found.range() if found.is_finite else finite_range(tensor, name))
            if not found.is_finite:
                spoilt.append(name)
    return ranges, spoilt


def _place(found: Probe, run: ModuleRun, where: str) -> str:
    """Describes how many elements of a tensor are bad and where they are."""
    size = math.prod(found.shape)
    of = f"shape {found.shape}, {dtype_text(found.dtype)}"
    of += f", {found.path!r} in its structure" if found.path else ""
    many = f"one of {plural(size, 'element')}, " if found.count is None else f"{found.count} of {size}, the first "
    if found.count == size and size > 1:
        many = f"all {size}, the first "
    position = found.position()
    if position is None:
        return of
    layout = layout_of(run.module) if where in ("output", "loss") and found.path in ("", "[0]") else None
    if layout is not None and len(position) == 3:
        axes = axes_of(found.shape, layout)
        assert axes.channel is not None
        assert axes.time is not None
        sample, row = position[axes.batch], [*position[: axes.batch], *position[axes.batch + 1 :]]
        channel, time = row[axes.channel], row[axes.time]
        return f"{many}at sample {sample}, channel {channel}, time {time} ({of})"
    return f"{many}at index {position} ({of})"
