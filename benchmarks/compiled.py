"""Measures the cost of tapping a compiled model, in interleaved rounds.

    python -m benchmarks.compiled [--rounds 30] [--layers 32] [--channels 64] [--batch 4] [--length 2000]
        [--device cpu]

The script compares plain and captured forwards, eager and compiled. It writes the section "Compiled" of RESULTS.md:
milliseconds a forward (median, and the middle half of the rounds), and the ratio to the plain compiled forward, computed
round by round. Every output is checked against hooks that clone before the timing. The result of a forward lives until the
next one of its kind is done, as in a loop over batches.

For the second table, on Linux CPUs, the process keeps the memory that it frees (as MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_ set for a whole process). The plain forward does not need the memory of captured outputs. With
glibc's defaults the system maps and unmaps its pages in every forward. A compiled model does not copy outputs for a
capture.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness import write_section
from convtap import capture
from convtap._capture.tapped import tapped


class Block(nn.Module):
    """A residual block of a temporal convolutional network, with in-place activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, T) to (B, C, T)."""
        return x + self.norm(self.relu(self.conv(x)))


def convolutions(layers: int, channels: int) -> nn.Module:
    """A stack of residual blocks with one convolution each."""
    return nn.Sequential(*(Block(channels) for _ in range(layers))).eval()


def cloned(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Returns the reference: the outputs that hooks clone."""
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: found.append(output.clone()))
        for module in model.modules()
        if isinstance(module, nn.Conv1d)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def check(name: str, acts: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raises an error unless a way of capturing returns every layer's output."""
    if len(acts) != len(expected):
        raise SystemExit(f"{name}: {len(acts)} layers captured, of {len(expected)}")
    for (key, value), reference in zip(acts.items(), expected, strict=True):
        torch.testing.assert_close(
            value, reference, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{name}, {key}: {text}"
        )


def ways(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Returns the forward passes to compare, compiled and checked."""
    expected = cloned(model, x)
    compiled = torch.compile(model, fullgraph=True)
    compiled(x)  # before tapped registers its hooks, so that this one is plain
    kept = [value.clone() for value in expected]

    def compiled_captured() -> object:
        with capture(compiled) as acts:
            compiled(x)
        return acts

    def compiled_and_clones() -> object:
        compiled(x)
        return [value.clone() for value in kept]

    both = torch.compile(tapped(model), fullgraph=True)
    means = torch.compile(tapped(model, reduce=lambda t: t.mean(-1)), fullgraph=True)

    def captured() -> object:
        with capture(eager_model) as acts:
            eager_model(x)
        return acts

    # the eager rows run a copy, without the hooks of tapped
    eager_model = convolutions(sum(isinstance(module, nn.Conv1d) for module in model.modules()), x.shape[1]).to(
        x.device
    )
    eager_model.load_state_dict(model.state_dict())
    check("eager + capture", dict(captured()), expected)  # type: ignore[call-overload]
    check("compiled, captured", dict(compiled_captured()), expected)  # type: ignore[call-overload]
    check("compiled tapped", both(x)[1], expected)
    check("compiled tapped, reduced", means(x)[1], [value.mean(-1) for value in expected])
    return {
        "plain eager": lambda: eager_model(x),
        "eager + capture": captured,
        "compiled": lambda: compiled(x),
        "compiled, and clones of as many bytes": compiled_and_clones,
        "capture(compiled)": compiled_captured,
        "compiled tapped": lambda: both(x),
        "compiled tapped, reduce=mean over time": lambda: means(x),
    }


def measure(forwards: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Times every forward once a round, in milliseconds, in rotated order."""

    results: dict[str, object] = {}

    def once(name: str) -> float:
        start = time.perf_counter()
        results[name] = forwards[name]()
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    names = list(forwards)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-3, rounds):  # three rounds to warm up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = once(name)
            if number >= 0:
                times[name].append(elapsed)
    return times


def table(times: dict[str, list[float]]) -> str:
    """Returns the medians, middle halves and ratios as a Markdown table."""
    lines = ["| forward | ms, median | middle half | × compiled | middle half |", "|---|---:|---:|---:|---:|"]
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = [value / base for value, base in zip(values, times["compiled"], strict=True)]
        least, ratio, most = statistics.quantiles(ratios, n=4)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f}–{high:.2f} | {ratio:.2f} | {least:.2f}–{most:.2f} |")
    return "\n".join(lines)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory. Returns whether that worked."""
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


def main() -> None:
    """Reads the arguments, measures, and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rounds": 30, "layers": 32, "channels": 64, "batch": 4, "length": 2000, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = convolutions(options.layers, options.channels).to(options.device)
    x = torch.randn(options.batch, options.channels, options.length, device=options.device)
    with torch.no_grad():
        forwards = ways(model, x)
        tables = [table(measure(forwards, options.rounds, options.device))]
        if options.device == "cpu" and keep_freed_memory():
            tables.append(table(measure(forwards, options.rounds, options.device)))
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    channels = options.channels
    head = (
        f"`python -m benchmarks.compiled`. {options.layers} × Conv1d({channels}, {channels}, 3) in residual blocks on "
        f"{tuple(x.shape)}, all captured; {where}, torch {torch.__version__}, {options.rounds} interleaved rounds."
    )
    write_section("Compiled", f"{head}\n\n" + "\n\nThe same, freed memory kept by the process:\n\n".join(tables))


if __name__ == "__main__":
    main()
