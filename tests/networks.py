"""Random small networks: what hypothesis draws, the module that runs it, and how it is written for a person to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CHANNELS = 2

#: A statement is a tuple: what it does, then its numbers and its bodies (tuples of statements).
Body = tuple[tuple[Any, ...], ...]


class Planned(RuntimeError):
    """An error that a network raises on purpose."""


class Return(Exception):
    """Ends the module that runs now, with its value so far."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class Options:
    """The arguments of one capture, and the passes that it is open for."""

    first: int = 0
    last: int = 99
    layers: tuple[str, ...] | None = None
    at: str = "output"
    detach: bool = True
    copy: bool = True
    reduce: bool = False
    dtype: torch.dtype | None = None
    keep: str = "all"
    functional: bool | None = None
    offload: str | None = None
    stop: bool = False
    grads: bool = False


@dataclass(frozen=True)
class Case:
    """A network, how it is run, and what is captured."""

    convs: tuple[str, ...]
    blocks: tuple[tuple[bool, Body], ...]
    body: Body
    passes: tuple[tuple[int, int, int], ...]  # which part (-1: the root), batch, length
    captures: tuple[Options, ...]
    grad: str = "grad"
    training: bool = False
    dtype: str = "float32"
    seed: int = 0

    @property
    def hides(self) -> bool:
        """Whether the network may write where no version counter sees it: not where a capture relies on the counter."""
        counted = any(not o.copy or (not o.detach and o.at == "input") for o in self.captures)
        return self.grad != "grad" and not counted

    def __str__(self) -> str:
        lines = [f"convs: {', '.join(self.convs)}"]
        for i, (shares, body) in enumerate(self.blocks):
            lines += [f"blocks[{i}]{' (its conv is convs[0])' if shares else ''}:", *_written(body, 1)]
        lines += ["forward:", *_written(self.body, 1)]
        lines += [
            f"pass of {'the model' if p < 0 else f'blocks[{p}]'}: ({b}, {CHANNELS}, {t})" for p, b, t in self.passes
        ]
        lines += [f"{'train' if self.training else 'eval'}, {self.grad}, {self.dtype}, seed {self.seed}"]
        return "\n".join([*lines, *map(str, self.captures)])


def _written(body: Body, depth: int) -> list[str]:
    lines = []
    for what, *rest in body:
        numbers = [str(item) for item in rest if not isinstance(item, tuple)]
        lines.append("    " * depth + " ".join([what, *numbers]))
        for item in rest:
            if isinstance(item, tuple):
                lines += _written(item, depth + 1) or ["    " * (depth + 1) + "pass"]
    return lines


# -- the layers


class Twice(nn.Conv1d):
    """Convolves twice in one call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x).relu_())


class Pair(nn.Conv1d):
    """Returns a tuple of two tensors with memory of their own."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y * 2


class Shares(nn.Conv1d):
    """Returns a dict of two tensors that share memory."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y, "again": y[:, :1]}


class Own(nn.Module):
    """No Conv1d, but owns a weight and convolves with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=1).relu_()


CONVS: dict[str, tuple[type[nn.Conv1d], dict[str, Any]]] = {
    "plain": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "pointwise": (nn.Conv1d, {"kernel_size": 1, "bias": False}),
    "grouped": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}),
    "circular": (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "normed": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "twice": (Twice, {"kernel_size": 3, "padding": 1}),
    "pair": (Pair, {"kernel_size": 3, "padding": 1}),
    "shares": (Shares, {"kernel_size": 3, "padding": 1}),
}


def made(kind: str) -> nn.Module:
    """Makes a layer of one of the kinds."""
    cls, arguments = CONVS[kind]
    conv = cls(CHANNELS, CHANNELS, **arguments)
    return parametrizations.weight_norm(conv) if kind == "normed" else conv


def first_of(value: Any) -> Tensor:
    """The tensor that the network goes on with."""
    return value["y"] if isinstance(value, dict) else value[0] if isinstance(value, tuple) else value


# -- the network


class Block(nn.Module):
    """A part of the network with a layer of its own, or the network's first one under a second name."""

    def __init__(self, net: Net, body: Body, shares: bool) -> None:
        super().__init__()
        self.conv = net.convs[0] if shares else made("plain")
        self._run = [net, body]

    def forward(self, x: Tensor) -> Tensor:
        net, body = self._run
        try:
            return net.run(body, x, self)
        except Return as early:
            return early.value


class Net(nn.Module):
    """Runs a case's statements."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.convs = nn.ModuleList(made(kind) for kind in case.convs)
        self.blocks = nn.ModuleList()
        for shares, body in case.blocks:
            self.blocks.append(Block(self, body, shares))
        self.loose = nn.ParameterList([torch.randn(CHANNELS, CHANNELS, width) for width in (1, 3)])
        self.own = Own()
        self.lin = nn.Linear(CHANNELS, CHANNELS)
        self.norm = nn.BatchNorm1d(CHANNELS)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.run(self.case.body, x, self)
        except Return as early:
            return early.value

    def run(self, body: Body, x: Tensor, owner: nn.Module) -> Tensor:
        for what, *rest in body:
            x = getattr(self, f"do_{what}")(x, owner, *rest)
        return x

    # convolutions

    def do_conv(self, x, owner, i, keyword=False):
        return first_of(self.convs[i](input=x) if keyword and type(self.convs[i]) is nn.Conv1d else self.convs[i](x))

    def do_mine(self, x, owner):
        return first_of(owner.conv(x)) if isinstance(owner, Block) else x

    def do_forward(self, x, owner, i):
        return nn.Conv1d.forward(self.convs[i], x)

    def do_function(self, x, owner, i, style):
        conv = self.convs[i]
        return self.convolved(style, x, conv.weight, conv.bias, conv.padding, conv.dilation, conv.groups)

    def do_scaled(self, x, owner, i):
        conv = self.convs[i]
        return F.conv1d(x, conv.weight * 2, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def do_loose(self, x, owner, i, style):
        return self.convolved(style, x, self.loose[i], None, (i,), (1,), 1)

    def do_own(self, x, owner):
        return self.own(x)

    def do_lin(self, x, owner):
        return F.conv1d(x, self.lin.weight.unsqueeze(-1), self.lin.bias)

    def do_bad(self, x, owner, i):
        try:
            self.convs[i](x[:, :1])
        except RuntimeError:
            raise Planned("a layer was given too few channels") from None
        return x

    @staticmethod
    def convolved(style, x, weight, bias, padding, dilation, groups):
        if style == 0:
            return F.conv1d(x, weight, bias, (1,), padding, dilation, groups)
        if style == 1:
            return F.conv1d(input=x, weight=weight, bias=bias, padding=padding, dilation=dilation, groups=groups)
        if style == 2:
            return torch.conv1d(x, weight, bias, 1, padding, dilation, groups)
        return torch.ops.aten.convolution(x, weight, bias, [1], list(padding), list(dilation), False, [0], groups)

    # everything else

    def do_tanh(self, x, owner):
        return torch.tanh(x)

    def do_act(self, x, owner):
        return self.act(x)

    def do_add_(self, x, owner):
        return x.add_(0.25)

    def do_half_(self, x, owner):
        x[:, :1].mul_(0.5)
        return x

    def do_flat_(self, x, owner):
        if x.is_contiguous():
            x.view(-1)[1:3] = 0.125
        return x

    def do_hidden_(self, x, owner):
        if self.case.hides:
            x.data.mul_(2)
        return x

    def do_alias(self, x, owner):
        return x[:]

    def do_drop(self, x, owner):
        return self.drop(x)

    def do_norm(self, x, owner):
        return self.norm(x)

    def do_skip(self, x, owner, body):
        return self.run(body, x, owner) + x

    def do_two(self, x, owner, a, b):
        return self.run(a, x, owner) * 0.5 + self.run(b, x, owner) * 0.5

    def do_loop(self, x, owner, times, body):
        for _ in range(times):
            x = self.run(body, x, owner)
        return x

    def do_when(self, x, owner, a, b):
        return self.run(a if float(x.detach().mean()) > 0 else b, x, owner)

    def do_block(self, x, owner, i=None):
        return x if i is None else self.blocks[i](x)

    def do_attempt(self, x, owner, body):
        try:
            return self.run(body, x, owner)
        except Planned:
            return x

    def do_fail(self, x, owner):
        raise Planned("halfway")

    def do_leave(self, x, owner):
        raise Return(x)

    def do_nograd(self, x, owner, body):
        with torch.no_grad():
            return self.run(body, x, owner)

    def do_recomputed(self, x, owner, body):
        return checkpoint(lambda y: self.run(body, y * 1, owner), x, use_reentrant=False)


# -- what is drawn

_IN_PLACE = ("act", "add_", "half_", "flat_", "hidden_")
_SIMPLE = (*_IN_PLACE, "tanh", "alias", "drop", "norm")
_CONVOLUTIONS = (
    "conv",
    "conv",
    "conv",
    "conv",
    "mine",
    "forward",
    "function",
    "function",
    "scaled",
    "loose",
    "own",
    "lin",
)
_COMPOUND = ("skip", "two", "loop", "when", "attempt", "nograd", "recomputed", "block", "block")
_ENDS = ("fail", "leave", "bad")


@st.composite
def bodies(draw: Any, convs: int, blocks: int, depth: int, ends: bool = True) -> Body:
    """Draws statements; ``blocks`` is how many blocks they may call."""
    kinds = [*_CONVOLUTIONS, *_CONVOLUTIONS, *_SIMPLE, *(_COMPOUND if depth else ()), *(_ENDS if ends else ())]
    statements = []
    for what in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6 if depth else 3)):
        statements.append((what, *_rest(draw, what, convs, blocks, depth - 1, ends)))
        if what in _CONVOLUTIONS and draw(st.booleans()):
            statements.append((draw(st.sampled_from(_IN_PLACE)),))
        if what in _ENDS:
            break
    return tuple(statements)


def _rest(draw: Any, what: str, convs: int, blocks: int, depth: int, ends: bool) -> list[Any]:
    def inner(ends: bool = ends) -> Body:
        return draw(bodies(convs, blocks, depth, ends))

    if what in ("forward", "scaled", "bad"):
        return [draw(st.integers(0, convs - 1))]
    if what == "conv":
        return [draw(st.integers(0, convs - 1)), draw(st.booleans())]
    if what == "function":
        return [draw(st.integers(0, convs - 1)), draw(st.integers(0, 3))]
    if what == "loose":
        return [draw(st.integers(0, 1)), draw(st.integers(0, 3))]
    if what in ("skip", "attempt", "nograd"):
        return [inner()]
    if what == "recomputed":
        return [inner(ends=False)]
    if what in ("two", "when"):
        return [inner(), inner()]
    if what == "loop":
        return [draw(st.integers(1, 3)), inner()]
    return [draw(st.integers(0, blocks - 1))] if what == "block" and blocks else []


@st.composite
def options(draw: Any, names: tuple[str, ...], passes: int, alone: bool) -> Options:
    """Draws the arguments of a capture. Most of them stay at their default most of the time."""

    def rarely(*values: Any, default: Any = None) -> Any:
        return draw(st.sampled_from([default, default, *values]))

    functional = rarely(True, False)
    if functional is False:
        names = tuple(name for name in names if name.startswith(("convs", "blocks")) or name == "own")
    layers = draw(st.none() | st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple))
    first = draw(st.integers(0, passes - 1))
    at = rarely("input", default="output")
    detach, copy = draw(st.booleans()), rarely(False, default=True)
    return Options(
        first=first,
        last=draw(st.integers(first, passes - 1)),
        layers=layers,
        at=at,
        detach=detach,
        copy=copy,
        reduce=rarely(True, default=False),
        dtype=rarely(torch.float16),
        keep=rarely("last", default="all"),
        functional=functional,
        offload=rarely("cpu"),
        stop=alone and layers is not None and draw(st.booleans()),
        grads=at == "output" and rarely(True, default=False),
    )


@st.composite
def cases(draw: Any) -> Case:
    """Draws everything."""
    convs = draw(st.lists(st.sampled_from(sorted(CONVS)), min_size=1, max_size=3).map(tuple))
    blocks: list[tuple[bool, Body]] = []
    for i in range(draw(st.integers(0, 2))):
        blocks.append((draw(st.booleans()), draw(bodies(len(convs), i, 1))))
    body = draw(bodies(len(convs), len(blocks), 2))
    part = st.sampled_from([-1, -1, *range(len(blocks))])
    passes = draw(st.lists(st.tuples(part, st.integers(1, 2), st.integers(3, 5)), min_size=1, max_size=3).map(tuple))
    names = [*(f"convs.{i}" for i in range(len(convs))), "loose.0", "loose.1", "own", "lin", "F.conv1d"]
    for i, (shares, _) in enumerate(blocks):
        names += [f"blocks.{i}", *([] if shares else [f"blocks.{i}.conv"])]
    captures = draw(st.integers(1, 2))
    drawn = [draw(options(tuple(names), len(passes), captures == 1)) for _ in range(captures)]
    return Case(
        convs=convs,
        blocks=tuple(blocks),
        body=body,
        passes=passes,
        captures=tuple(drawn),
        grad=draw(st.sampled_from(["grad", "grad", "no_grad", "inference"])),
        training=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "bfloat16", "autocast"])),
        seed=draw(st.integers(0, 7)),
    )
