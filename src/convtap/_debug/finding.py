"""What ``finite`` found: the layer that made a NaN or an Inf, where it lies, and the ranges of what went in."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from convtap._debug.probe import FiniteRange, Probe, finite_range, probe, read_all
from convtap._errors import listed, plural
from convtap._public import public
from convtap._select.layer_layout import layout_of
from convtap._tensors.layout import axes_of
from convtap._tensors.statistics import dtype_text


class Frame:
    """One run of a watched module.

    Attributes:
        parent: the watched run around it, or None.
        last: the name of the part that ended last in it.
        inputs: its inputs that could be looked at.
        method: the method that runs, if it was entered by another one than ``forward``; its arguments were not looked at.
        before: the name of the layer that ran before it, if code outside of the model calls the layers.
    """

    __slots__ = ("before", "forward", "index", "inputs", "last", "method", "module", "name", "parent")

    def __init__(self, name: str, module: nn.Module, parent: Frame | None, index: int, forward: int) -> None:
        self.name = name
        self.module = module
        self.parent = parent
        self.index = index
        self.forward = forward
        self.last: str | None = None
        self.inputs: list[Probe] = []
        self.method = ""
        self.before: str | None = None

    def is_inside(self, other: Frame) -> bool:
        """Whether this run is part of another one."""
        frame = self.parent
        while frame is not None and frame is not other:
            frame = frame.parent
        return frame is other


class Link:
    """A tensor on its way between modules: which runs returned it, and which took it."""

    __slots__ = ("found", "listened", "reference", "sources", "targets", "version")

    def __init__(self, tensor: Tensor, version: int, found: Probe | None) -> None:
        self.reference = weakref.ref(tensor)
        self.version = version
        self.found = found
        self.sources: list[Frame] = []
        self.targets: list[Frame] = []
        self.listened = False

    def innermost_targets(self) -> list[Frame]:
        """The runs that took the tensor, without those that only handed it to a part of theirs."""
        return [run for run in self.targets if not any(other.is_inside(run) for other in self.targets)]


@dataclass
class Event:
    """A tensor that holds NaN or Inf, or may do so: where it was seen, and whose it is."""

    where: str
    found: Probe
    frame: Frame | None = None
    link: Link | None = None
    parameter: str = ""


@public
@dataclass(frozen=True)
class Range:
    """The least and the greatest finite value of a tensor, and how many of its elements are not finite.

    Attributes:
        name: what the tensor is; ``""`` for a module's only input.
        low: the least finite value; NaN if there is none, or on an accelerator if the tensor holds NaN or Inf.
        high: the greatest one.
        nan: how many elements are NaN; None where low and high are not known.
        inf: how many are Inf or -Inf.
    """

    name: str
    low: float
    high: float
    nan: int | None = 0
    inf: int | None = 0

    def __str__(self) -> str:
        return f"{self.name} {self._text()}".lstrip()

    def _text(self) -> str:
        if self.nan is None or self.inf is None:
            return "with NaN or Inf"
        counts = " and ".join(f"{count} {what}" for count, what in ((self.nan, "NaN"), (self.inf, "Inf")) if count)
        if self.low != self.low:
            return f"without a finite value ({counts})"
        return f"[{self.low:.4g}, {self.high:.4g}]" + (f" and {counts}" if counts else "")


@public
@dataclass(frozen=True)
class Finding:
    """The first NaN or Inf of a block. Print it for all of it in words.

    Attributes:
        layer: the module that made it. Where nobody in the model did, the outermost one.
        type: the class of that module.
        where: ``"output"``: the module's output. ``"code"``: a tensor that the module's own forward made, between two of its
            parts. ``"input"``: what the model was given. ``"gradient"``: what the module's backward made, and ``"loss"``:
            the gradient that the loss gave to the model's output.
        what: ``"NaN"``, ``"Inf"`` or ``"-Inf"``.
        index: how many times the module had run before, in this block.
        forward: the number of the forward pass.
        position: the index of a bad element, such as (sample, channel, time), or None if it is not known.
        count: how many elements are bad, or None if they were not counted (on an accelerator).
        shape: the shape of the tensor that holds them.
        dtype: its type.
        inputs: the ranges of the module's inputs: of their finite values, with the numbers of NaN and Inf.
        weights: the ranges of its own parameters and buffers, in the same way.
        message: all of it in words.
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
        return self.message


def judge(event: Event, hint: str) -> Finding:
    """Says who made the tensor of the first bad event; see Note: [The first bad tensor].

    Args:
        hint: what could not be watched, as a sentence, or nothing.
    """
    found = event.found
    if event.where == "gradient":
        where, frame, cause = _gradient_cause(event)
    else:
        where, frame, cause = _forward_cause(event)
    weights, spoilt = _weights(frame.module)
    inputs = [_range(seen.path, seen.range()) for seen in frame.inputs]
    run = "" if frame.index < 0 else f" (call {frame.index}, forward pass {frame.forward})"
    method = f".{frame.method}" if frame.method else ""
    layer = f"{frame.name!r} ({type(frame.module).__name__}{method}){run}"
    sentences = [f"{cause.format(layer=layer, what=found.kind)}: {_place(found, frame, where)}."]
    if where != "input":
        sentences += _ranges(inputs, weights, spoilt)
    if found.kind == "-Inf":
        sentences.append("If it is a mask, it is meant: pass inf=False.")
    return Finding(
        layer=frame.name,
        type=type(frame.module).__name__,
        where=where,
        what=found.kind,
        index=frame.index,
        forward=frame.forward,
        position=found.position(),
        count=found.count,
        shape=found.shape,
        dtype=found.dtype,
        inputs=inputs,
        weights=weights,
        message=" ".join([*sentences, hint]).rstrip(),
    )


def _ranges(inputs: list[Range], weights: list[Range], spoilt: list[str]) -> list[str]:
    """Says in sentences what went into a module, what its weights are, and which of them are bad themselves."""
    ranges = [f"its input: {listed(map(str, inputs))}"] if inputs else []
    ranges += [f"its {weight}" for weight in weights]
    text = f"{listed(ranges)}."
    found = [text[0].upper() + text[1:]] if ranges else []
    return found + ([f"The cause is its {listed(spoilt)}: that holds NaN or Inf itself."] if spoilt else [])


def _forward_cause(event: Event) -> tuple[str, Frame, str]:
    frame = event.frame
    assert frame is not None
    if event.where == "output":
        after = "" if frame.last is None else f", in its own code after {frame.last!r}"
        return "output", frame, f"{{layer}} produces {{what}} from finite inputs{after}"
    if frame.parent is None or (frame.parent.method and frame.parent.last is None):
        when = (
            "before any layer ran"
            if frame.before is None
            else f"though {frame.before!r}, the layer before it, is finite"
        )
        return "input", frame, f"the input given to {{layer}} holds {{what}} already, {when}"
    after = "" if frame.parent.last is None else f"after {frame.parent.last!r} and "
    return "code", frame.parent, f"{{layer}} produces {{what}} in its own code, {after}before {frame.name!r}"


def _gradient_cause(event: Event) -> tuple[str, Frame, str]:
    if event.parameter:
        assert event.frame is not None
        cause = f"the backward pass of {{layer}} makes {{what}} in the gradient of its {event.parameter}"
        return "gradient", event.frame, cause
    assert event.link is not None
    takers = event.link.innermost_targets()
    if takers:
        others = [repr(run.name) for run in takers[:-1]]
        either = f" (or of {listed(others)}, which took the same tensor)" if others else ""
        return (
            "gradient",
            takers[-1],
            f"the backward pass of {{layer}}{either} makes {{what}} in the gradient of its input",
        )
    source = event.link.sources[0]
    outermost = event.link.sources[-1]
    if outermost.parent is None:
        return "loss", outermost, "the loss gives {what} as the gradient of the output of {layer}; no layer made it"
    inside = outermost.parent
    return "gradient", inside, f"the backward pass of {{layer}} makes {{what}} in its own code, after {source.name!r}"


def _weights(module: nn.Module) -> tuple[list[Range], list[str]]:
    """The ranges of a module's own parameters and buffers, and the names of those that are bad themselves."""
    ranges, spoilt = [], []
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        found = None if tensor is None or isinstance(tensor, nn.parameter.UninitializedParameter) else probe(tensor)
        if found is not None and tensor is not None:
            read_all([found])
            known = found.range() or finite_range(tensor)
            ranges.append(_range(name, known))
            if known.nan or known.inf:
                spoilt.append(name)
    return ranges, spoilt


def _range(name: str, found: FiniteRange | None) -> Range:
    return Range(name, math.nan, math.nan, None, None) if found is None else Range(name, *found)


def _place(found: Probe, frame: Frame, where: str) -> str:
    """Says how much of a tensor is bad, and where."""
    size = math.prod(found.shape)
    of = f"shape {found.shape}, {dtype_text(found.dtype)}"
    of += f", {found.path!r} in its structure" if found.path else ""
    many = f"one of {plural(size, 'element')}, " if found.count is None else f"{found.count} of {size}, the first "
    if found.count == size and size > 1:
        many = f"all {size}, the first "
    position = found.position()
    if position is None:
        return of
    layout = layout_of(frame.module) if where in ("output", "loss") and found.path in ("", "[0]") else None
    if layout is not None and len(position) == 3:
        axes = axes_of(found.shape, layout)
        assert axes.channel is not None
        assert axes.time is not None
        sample, row = position[axes.batch], [*position[: axes.batch], *position[axes.batch + 1 :]]
        channel, time = row[axes.channel], row[axes.time]
        return f"{many}at sample {sample}, channel {channel}, time {time} ({of})"
    return f"{many}at index {position} ({of})"
