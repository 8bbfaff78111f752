"""A second implementation of the random networks: no module is called, nothing is written in place, all is noted.

It computes with the network's parameters. A variable is a box, and two variables that share memory are one box, so what
a write in place means is written down here once more and not taken from torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import Body, Net, Planned, Return


class Box:
    """A piece of memory: what is in it now, and how often it was written."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.writes = 0

    def write(self, value: Tensor) -> Box:
        old = self.value
        if old.requires_grad and not value.requires_grad:  # written under no_grad: the history stays the old one
            with torch.enable_grad():
                value = _Rewritten.apply(old, value)
        self.value = value
        self.writes += 1
        return self


class Cut(Box):
    """A view made under ``no_grad``: the same memory, cut off from the history of what is in it."""

    def __init__(self, whole: Box) -> None:
        self.whole = whole

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.whole.value.detach().requires_grad_()

    @property
    def writes(self) -> int:  # type: ignore[override]
        return self.whole.writes

    def write(self, value: Tensor) -> Box:
        self.whole.write(value)
        return self


class _Rewritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor) -> Tensor:
        return new.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


@dataclass
class Event:
    """One layer's run: by which name and way, in which pass, and a value with the box that it lay in."""

    name: str
    via: str
    part: int
    value: Any
    box: Box
    writes: int

    @property
    def was_written(self) -> bool:
        """Whether the memory was written after the event."""
        return self.box.writes > self.writes

    @property
    def shares_memory(self) -> bool:
        """Whether an output may lie in the memory of an input, or in that of another output of the same layer."""
        return isinstance(self.value, dict) or (self.name.startswith("blocks.") and not self.name.endswith(".conv"))


class Interpreter:
    """Runs a network's statements and notes every layer's input and output.

    Attributes:
        given: the inputs, in the order in which the layers began.
        events: the outputs, in the order in which they ended.
    """

    def __init__(self, net: Net) -> None:
        self.net = net
        self.mean, self.var = net.norm.running_mean.clone(), net.norm.running_var.clone()
        self.names = {id(conv): f"convs.{i}" for i, conv in reversed(list(enumerate(net.convs)))}
        self.names.update(
            {id(b.conv): f"blocks.{i}.conv" for i, b in enumerate(net.blocks) if id(b.conv) not in self.names}
        )
        self.given: list[Event] = []
        self.events: list[Event] = []
        self.part = 0

    def forward(self, part: int, x: Tensor) -> Box:
        """Runs one pass."""
        box = Box(x.clone())
        if part >= 0:
            return self.do_block(box, None, part)
        try:
            return self.run(self.net.case.body, box, None)
        except Return as early:
            return early.value

    def run(self, body: Body, x: Box, owner: Any) -> Box:
        for what, *rest in body:
            x = getattr(self, f"do_{what}")(x, owner, *rest)
        return x

    # convolutions

    def began(self, name: str, via: str, box: Box, value: Tensor | None = None) -> None:
        self.given.append(Event(name, via, self.part, box.value if value is None else value, box, box.writes))

    def ended(self, name: str, via: str, box: Box, value: Any = None) -> Box:
        value = box.value if value is None else value
        self.events.append(Event(name, via, self.part, value, box, box.writes))
        return box

    def computed(self, conv: nn.Conv1d, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's formula gives, and what its convolution is given after padding."""
        padding: Any = conv.padding
        if conv.padding_mode == "circular":
            x, padding = torch.cat([x[..., -1:], x, x[..., :1]], -1), 0
        return F.conv1d(x, conv.weight, conv.bias, 1, padding, conv.dilation, conv.groups), x

    def called(self, conv: nn.Conv1d, x: Box) -> Box:
        name, kind = self.names[id(conv)], type(conv).__name__
        self.began(name, "module", x)
        y, _ = self.computed(conv, x.value)
        if kind == "Twice":
            y, _ = self.computed(conv, torch.relu(y))
        box = Box(y)
        value = (y, y * 2) if kind == "Pair" else {"y": y, "again": y[:, :1]} if kind == "Shares" else y
        return self.ended(name, "module", box, value)

    def function(self, name: str, x: Box, y: Tensor, given: Tensor | None = None) -> Box:
        self.began(name, "function", x, given)
        return self.ended(name, "function", Box(y))

    def owner_name(self, conv: nn.Module) -> str:
        return "F.conv1d" if hasattr(conv, "parametrizations") else self.names[id(conv)]

    def do_conv(self, x, owner, i, keyword):
        return self.called(self.net.convs[i], x)

    def do_mine(self, x, owner):
        return x if owner is None else self.called(owner.conv, x)

    def do_forward(self, x, owner, i):
        conv = self.net.convs[i]
        y, given = self.computed(conv, x.value)
        inside = Box(given) if given is not x.value else x
        return self.function(self.owner_name(conv), inside, y)

    def do_function(self, x, owner, i, style):
        conv = self.net.convs[i]
        y = self.styled(style, x.value, conv.weight, conv.bias, conv.padding, conv.dilation, conv.groups)
        return self.function(self.owner_name(conv), x, y)

    def do_scaled(self, x, owner, i):
        conv = self.net.convs[i]
        y = F.conv1d(x.value, conv.weight * 2, conv.bias, 1, conv.padding, conv.dilation, conv.groups)
        return self.function("F.conv1d", x, y)

    def do_loose(self, x, owner, i, style):
        y = self.styled(style, x.value, self.net.loose[i], None, (i,), (1,), 1)
        return self.function(f"loose.{i}", x, y)

    @staticmethod
    def styled(style: int, x: Tensor, weight: Tensor, bias: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        if style < 3:
            return F.conv1d(x, weight, bias, 1, padding, dilation, groups)
        return torch.convolution(x, weight, bias, (1,), padding, dilation, False, (0,), groups)  # autocast lets it be

    def do_own(self, x, owner):
        self.began("own", "module", x)
        box = self.function("own", x, F.conv1d(x.value, self.net.own.weight, None, 1, 1))
        return self.ended("own", "module", box.write(torch.relu(box.value)))

    def do_lin(self, x, owner):
        return self.function("lin", x, F.conv1d(x.value, self.net.lin.weight[:, :, None], self.net.lin.bias))

    def do_bad(self, x, owner, i):
        conv = self.net.convs[i]
        self.began(self.names[id(conv)], "module", x, x.value[:, :1])
        raise Planned

    # everything else

    def do_tanh(self, x, owner):
        return Box(torch.tanh(x.value))

    def do_act(self, x, owner):
        return x.write(torch.relu(x.value))

    def do_add_(self, x, owner):
        return x.write(x.value + 0.25)

    def do_half_(self, x, owner):
        return x.write(torch.cat([x.value[:, :1] * 0.5, x.value[:, 1:]], 1))

    def do_flat_(self, x, owner):
        where = torch.zeros(x.value.shape, dtype=torch.bool)
        where[0, 0, 1:3] = True
        return x.write(x.value.masked_fill(where, 0.125))

    def do_hidden_(self, x, owner):
        return x.write(x.value * 2) if self.net.case.hides else x

    def do_alias(self, x, owner):
        return Cut(x) if x.value.requires_grad and not torch.is_grad_enabled() else x

    def do_drop(self, x, owner):
        return Box(F.dropout(x.value, 0.5, True)) if self.net.training else x

    def do_norm(self, x, owner):
        norm = self.net.norm
        return Box(F.batch_norm(x.value, self.mean, self.var, norm.weight, norm.bias, norm.training, 0.1, norm.eps))

    def do_skip(self, x, owner, body):
        y = self.run(body, x, owner)
        return Box(y.value + x.value)

    def do_two(self, x, owner, a, b):
        first = self.run(a, x, owner).value * 0.5
        return Box(first + self.run(b, x, owner).value * 0.5)

    def do_loop(self, x, owner, times, body):
        for _ in range(times):
            x = self.run(body, x, owner)
        return x

    def do_when(self, x, owner, a, b):
        return self.run(a if float(x.value.detach().mean()) > 0 else b, x, owner)

    def do_block(self, x, owner, i=None):
        if i is None:
            return x
        block = self.net.blocks[i]
        self.began(f"blocks.{i}", "module", x)
        try:
            y = self.run(block._run[1], x, block)
        except Return as early:
            y = early.value
        return self.ended(f"blocks.{i}", "module", y)

    def do_attempt(self, x, owner, body):
        try:
            return self.run(body, x, owner)
        except Planned:
            return x

    def do_fail(self, x, owner):
        raise Planned

    def do_leave(self, x, owner):
        raise Return(x)

    def do_nograd(self, x, owner, body):
        with torch.no_grad():
            return self.run(body, x, owner)

    def do_recomputed(self, x, owner, body):
        return self.run(body, Box(x.value * 1), owner)
