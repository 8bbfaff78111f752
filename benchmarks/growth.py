"""Measures how costs grow with layers, calls and the depth of the stack.

``python -m benchmarks.growth`` writes the section "Growth" of ``RESULTS.md``, with other libraries side by side. A slope is
that of the logarithms of time and size: 1 is linear, 2 is quadratic. The layers are as small as possible, so that all other
costs show.
"""

from __future__ import annotations

import math
import statistics as stats
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    declare_torchvision_operators,
    environment,
    interleave,
    markdown,
    quartiles,
    write_section,
)
from convtap import capture, compare, finite, list_layers, load, statistics, tapped, timeline, top
from convtap._errors import LayerNotFound

X = torch.zeros(1, 1, 4)
LAYERS = (500, 1000, 2000, 4000)
HALF = (250, 500, 1000, 2000)
CALLS = (1000, 4000, 16000)
DEPTHS = (0, 100, 200, 245, 250, 255, 300, 500)

#: Returns the timed function for a size.
Make = Callable[[int], Callable[[], object]]


class Named(nn.Module):
    """Layers with names of several parts, as in real models."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv1d(1, 1, 1)}) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["conv"](x)  # type: ignore[index]
        return x


class OneKernel(nn.Module):
    """A convolution function called by several methods, or with a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.kernel)

    def computed(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.kernel * 2)

    def encode(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.kernel)


def chain(count: int) -> nn.Module:
    """Returns a model with so many layers."""
    return nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(count))).eval()


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Returns the slope of a line through the logarithms."""
    return stats.linear_regression([math.log(n) for n in sizes], [math.log(s) for s in seconds]).slope


def grow(name: str, sizes: Sequence[int], make: Make, rounds: int = 5) -> list[str]:
    """Returns a row of medians at each size, the last quartiles and the slope."""
    medians: list[float] = []
    for size in sizes:
        case = make(size)
        seconds = interleave({name: case}, rounds, warmup=1)[name]
        low, middle, high = quartiles(seconds)
        medians.append(middle)
        del case
    cells = [f"{1e3 * median:,.2f}" for median in medians]
    return [name, *cells, f"{1e3 * low:,.2f} – {1e3 * high:,.2f}", f"{slope(sizes, medians):.2f}"]


def captured(model: nn.Module, passes: int = 1, **options: Any) -> Any:
    """Captures forward passes."""
    with torch.no_grad(), capture(model, **options) as acts:
        for _ in range(passes):
            model(X)
    return acts


def many(calls: int) -> Any:
    """Returns a capture of so many calls of one layer."""
    return captured(chain(1), calls, keep="all")


def by_hand(model: nn.Module, run: bool) -> None:
    """Registers hooks on every layer that keep a clone."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: found.__setitem__(name, out.clone()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d)
    ]
    try:
        if run:
            with torch.no_grad():
                model(X)
    finally:
        for handle in handles:
            handle.remove()


def extractor(model: nn.Module) -> nn.Module:
    """Returns torchvision's feature extractor, which traces the graph."""
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, [name for name, _ in model.named_children()])


def forward_of(model: nn.Module) -> Callable[[], object]:
    """One forward pass."""
    return torch.no_grad()(lambda: model(X))


def inside(opened: Callable[..., Any], model: nn.Module) -> Callable[[], object]:
    """Returns one forward pass inside a context."""

    def run() -> None:
        with torch.no_grad(), opened(model):
            model(X)

    return run


def misspelt(model: nn.Module) -> Callable[[], object]:
    """Selects a wrong name, which searches for the nearest one."""

    def run() -> None:
        try:
            list_layers(model, "blocks.1x7.cnv")
        except LayerNotFound:
            return
        raise AssertionError("a wrong name was found")

    return run


def with_model(make: Callable[[nn.Module], Callable[[], object]], kind: Callable[[int], nn.Module] = chain) -> Make:
    """Returns a case for a model of each size."""
    return lambda count: make(kind(count).eval())


def with_outputs(run: Callable[[Any], object], kind: Callable[[int], Any] | None = None) -> Make:
    """Returns a case for a capture of each size, of layers or (``many``) of calls."""

    def make(size: int) -> Callable[[], object]:
        acts = captured(chain(size)) if kind is None else kind(size)
        return lambda: run(acts)

    return make


def of_layers() -> list[list[str]]:
    """Returns the costs that grow with a model's layers, from 500 to 4,000."""
    return [
        grow("`tapped(model)`", LAYERS, with_model(lambda m: lambda: tapped(m).close())),
        grow("– hooks by hand, on and off", LAYERS, with_model(lambda m: lambda: by_hand(m, run=False))),
        grow("– torchvision `create_feature_extractor`", LAYERS, with_model(lambda m: lambda: extractor(m)), rounds=3),
        grow("forward of `tapped(model)`", LAYERS, with_model(lambda m: forward_of(tapped(m)))),
        grow("– forward of torchvision's", LAYERS, with_model(lambda m: forward_of(extractor(m)))),
        grow("`with capture(model): model(x)`", LAYERS, with_model(lambda m: inside(capture, m))),
        grow("– hooks by hand and forward", LAYERS, with_model(lambda m: lambda: by_hand(m, run=True))),
        grow("`with statistics(model): model(x)`", LAYERS, with_model(lambda m: inside(statistics, m)), rounds=3),
        grow("`with finite(model): model(x)`", LAYERS, with_model(lambda m: inside(finite, m))),
        grow("`list_layers(model)`", LAYERS, with_model(lambda m: lambda: list_layers(m))),
        grow("select by glob", LAYERS, with_model(lambda m: lambda: list_layers(m, "blocks.*.conv"), Named)),
        grow(
            "select by all names", LAYERS, with_model(lambda m: lambda: list_layers(m, [str(i) for i in range(len(m))]))
        ),
        grow("a wrong name", LAYERS, with_model(misspelt, Named)),
        grow(
            "`acts.coverage[name]` of each", LAYERS, with_outputs(lambda acts: [acts.coverage[name] for name in acts])
        ),
        grow("`acts.calls(name)` of each", LAYERS, with_outputs(lambda acts: [acts.calls(name) for name in acts])),
        grow("`acts.rename` of each", LAYERS, with_outputs(lambda acts: acts.rename({key: f"l{key}" for key in acts}))),
        grow("`print(acts)`", LAYERS, with_outputs(str)),
        grow("`acts.statistics()`", LAYERS, with_outputs(lambda acts: acts.statistics()), rounds=3),
        grow("`compare(acts, acts)`", LAYERS, with_outputs(lambda acts: compare(acts, acts)), rounds=3),
    ]


def of_fewer_layers() -> list[list[str]]:
    """Returns the costs that grow with a model's layers, from 250 to 2,000."""
    return [
        grow("`list_layers(model, example=x)`", HALF, with_model(lambda m: lambda: list_layers(m, example=X))),
        grow("`timeline(model, x)`", HALF, with_model(lambda m: lambda: timeline(m, X)), rounds=3),
        grow("`top(model, x, layer, 1)`", HALF, with_model(lambda m: lambda: top(m, X, "100", 1)), rounds=3),
        grow("`compare(a, b, example=x)`", HALF, with_model(lambda m: lambda: compare(m, m, example=X)), rounds=3),
    ]


def of_calls() -> list[list[str]]:
    """Returns the costs that grow with the calls of one layer."""
    folder = Path(tempfile.mkdtemp())

    def loading(calls: int) -> Callable[[], object]:
        many(calls).save(folder / f"{calls}.safetensors")
        return lambda: load(folder / f"{calls}.safetensors")

    each = partial(with_outputs, kind=many)
    return [
        grow("`acts.samples()`", CALLS, each(lambda acts: acts.samples()), rounds=3),
        grow("`acts.sample(i)` of 1,000", CALLS, each(lambda acts: [acts.sample(i) for i in range(1000)]), rounds=3),
        grow("`acts.cat()`", CALLS, each(lambda acts: acts.cat()), rounds=3),
        grow("`acts.statistics()`", CALLS, each(lambda acts: acts.statistics()), rounds=3),
        grow("`acts.save(path)`", CALLS, each(lambda acts: acts.save(folder / "saved.safetensors")), rounds=3),
        grow("`load(path)`", CALLS, loading, rounds=3),
        grow(
            "a loop in `capture(every=10)`",
            CALLS,
            lambda n: lambda: captured(chain(1), n, keep="all", every=10),
            rounds=3,
        ),
    ]


def newest_keys(sizes: Iterable[int], reads: int = 300) -> list[list[str]]:
    """Returns the cost of reading the newest key after each call, and of a list."""
    model, rows = chain(1), []
    for size in sizes:
        with torch.no_grad(), capture(model, keep="all") as acts:
            for number in range(size):
                model(X)
                acts[f"0#{number}" if number else "0"]
            seconds: dict[str, list[float]] = {"read": [], "call": []}
            for number in range(size, size + reads):
                start = time.perf_counter()
                model(X)
                middle = time.perf_counter()
                acts[f"0#{number}"]
                seconds["read"].append(time.perf_counter() - middle)
                seconds["call"].append(middle - start)
        kept = [torch.zeros(1) for _ in range(size)]
        by_list = interleave({"list": lambda kept=kept: kept[-1]}, reads)["list"]
        low, middle, high = (1e6 * value for value in quartiles(seconds["read"]))
        called = 1e6 * stats.median(seconds["call"])
        cells = (
            f"{size:,}",
            f"{middle:.1f}",
            f"{low:.1f} – {high:.1f}",
            f"{called:.1f}",
            f"{1e6 * stats.median(by_list):.1f}",
        )
        rows.append(list(cells))
    return rows


def at_depth(depth: int, run: Callable[[], Any]) -> Any:
    """Calls a function at a depth of so many frames."""
    return run() if depth == 0 else at_depth(depth - 1, run)


def depths(calls: int = 400) -> list[list[str]]:
    """Returns the microseconds that a capture adds to one call, by stack depth.

    Each is the lowest quartile of many calls.
    """

    def quickest(run: Callable[[Tensor], object]) -> float:
        return 1e6 * quartiles(interleave({"": lambda: run(X)}, calls)[""])[0]

    def added(model: nn.Module, run: Callable[[Tensor], object]) -> float:
        with torch.no_grad():
            plain = quickest(run)
            with capture(model, keep="last"):
                return quickest(run) - plain

    kernel, layer = OneKernel().eval(), chain(1)
    cases: dict[str, tuple[nn.Module, Callable[[Tensor], object]]] = {
        "`model(x)`, a Conv1d": (layer, layer),
        "`model(x)`, an `F.conv1d`": (kernel, kernel),
        "`model.encode(x)`": (kernel, kernel.encode),
        "`model.computed(x)`, a computed weight": (kernel, kernel.computed),
    }
    rows = []
    for name, (model, run) in cases.items():
        found = [at_depth(depth, lambda model=model, run=run: added(model, run)) for depth in DEPTHS]
        rows.append([name, *(f"{value:.1f}" for value in found), f"{stats.median(found[1:]) - found[0]:+.1f}"])
    return rows


def main() -> None:
    """Measures all cases and writes the section."""
    torch.set_num_threads(1)
    declare_torchvision_operators()
    sys.setrecursionlimit(20_000)
    ends = ("quartiles of the last", "slope")
    numbers = lambda sizes: tuple(f"{size:,}" for size in sizes)  # noqa: E731
    prints = grow("`print(acts)`", (1000, 10_000, 100_000), with_outputs(str, many), rounds=3)
    parts = [
        f"`python -m benchmarks.growth`. {environment()}. Milliseconds, medians; a slope of 1 is linear, 2 quadratic.",
        markdown(("layers", *numbers(LAYERS), *ends), of_layers()),
        markdown(("layers", *numbers(HALF), *ends), of_fewer_layers()),
        markdown(("calls", *numbers(CALLS), *ends), of_calls()),
        markdown(("calls", "1,000", "10,000", "100,000", *ends), [prints]),
        'Reading the newest key after each call with `keep="all"`, in microseconds:',
        markdown(("calls kept", "a read", "quartiles", "the call itself", "last item of a list"), newest_keys(CALLS)),
        "Microseconds that a capture adds to one call, by the depth of the stack. CPython keeps its frames in blocks of 16 KiB "
        "and returns an empty block to the system at once. Calls that cross the end of a block (near 250 frames of this "
        "benchmark) therefore allocate a new one each time. The last column excludes that: it is the median of all depths "
        "less that at 0.",
        markdown(("", *map(str, DEPTHS), "more"), depths()),
    ]
    write_section("Growth", "\n\n".join(parts))


if __name__ == "__main__":
    main()
