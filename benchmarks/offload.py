"""Measures offloading on a CUDA device.

    python -m benchmarks.offload [--rounds 20] [--device cuda:0]

The script writes the section "Offload" of RESULTS.md, and needs only torch and convtap. One run measures the bandwidth of
copies into pinned memory (the ceiling), a stack of convolutions that the bus limits and one that computing limits, the cost
of keeping outputs without offload, the cost of one small output, and the costs that decide where finished results live.
Every captured value is checked before the timing. ``python -m pytest tests/test_offload.py`` on the same machine runs the
tests that need CUDA.

Without CUDA the section states that its rows were not run. It contains no estimates.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import markdown, write_section
from convtap import capture
from convtap._offload.offloader import WINDOW, Offloader
from convtap._offload.pinned_pool import SLAB, pinned_limit

MIB = 2**20


# -- models


def transfer_bound(device: torch.device) -> tuple[nn.Module, Tensor]:
    """1 x 1 convolutions with outputs of 64 MiB, far faster than their copies."""
    layers = [layer for _ in range(24) for layer in (nn.Conv1d(64, 64, 1), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers).to(device).eval(), torch.randn(16, 64, 16384, device=device)


def compute_bound(device: torch.device, ceiling: float) -> tuple[nn.Module, Tensor]:
    """Convolutions with outputs of 32 MiB, at least three times slower than a copy."""
    x = torch.randn(8, 512, 2048, device=device)
    kernel = 9
    while True:
        conv = nn.Conv1d(512, 512, kernel, padding=kernel // 2).to(device)
        seconds = statistics.median(time_of(lambda conv=conv: conv(x), device) for _ in range(5))  # type: ignore[misc]
        if seconds > 3 * x.numel() * 4 / ceiling or kernel > 250:
            break
        kernel = 2 * kernel + 1
    layers = [
        layer for _ in range(12) for layer in (nn.Conv1d(512, 512, kernel, padding=kernel // 2), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers).to(device).eval(), x


def tiny(device: torch.device) -> tuple[nn.Module, Tensor]:
    """256 convolutions with outputs of 2 KiB, which show the host's cost of each."""
    return nn.Sequential(*(nn.Conv1d(8, 8, 3, padding=1) for _ in range(256))).to(device).eval(), torch.randn(
        1, 8, 64, device=device
    )


# -- ways to keep outputs


def hooked(model: nn.Module, keep: Callable[[Tensor], Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """Keeps outputs with a hook on each convolution."""

    def run(x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda _, __, output: outputs.append(keep(output)))
            for module in model.modules()
            if isinstance(module, nn.Conv1d)
        ]
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
        torch.cuda.synchronize()
        return outputs

    return run


def captured(model: nn.Module, window: int | None = None, **options: object) -> Callable[[Tensor], object]:
    """Keeps outputs with ``capture``, by default with its own window size."""

    def run(x: Tensor) -> object:
        block = capture(model, **options)  # type: ignore[arg-type]
        if window is not None:
            block._offloader = Offloader("cpu", window=window)
        with block as acts:
            model(x)  # leaving the capture waits for every copy
        return acts

    return run


# -- measuring


def time_of(run: Callable[[], object], device: torch.device) -> float:
    """Returns the wall-clock seconds, with the device idle before and after."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    kept = run()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del kept
    return seconds


def measure(
    cases: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, tuple[list[float], int]]:
    """Returns each case's seconds by round, and its peak of device memory.

    The first two rounds do not count.
    """
    found: dict[str, tuple[list[float], int]] = {name: ([], 0) for name in cases}
    for i in range(rounds + 2):
        for name, run in cases.items():
            torch.cuda.reset_peak_memory_stats(device)
            seconds = time_of(run, device)
            peak = torch.cuda.max_memory_allocated(device)
            if i >= 2:
                times, most = found[name]
                times.append(seconds)
                found[name] = (times, max(most, peak))
    return found


def ceiling(device: torch.device, size: int = 64 * MIB, count: int = 32) -> float:
    """Returns the bytes a second of copies from the device to existing pinned memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    targets = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def run() -> None:
        for i in range(count):
            targets[i % 2].copy_(source, non_blocking=True)

    return size * count / statistics.median(time_of(run, device) for _ in range(7))


def check(model: nn.Module, x: Tensor) -> int:
    """Compares captured values with synchronized clones. Returns all outputs' bytes."""
    expected: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: expected.append(output.detach().clone()))
        for module in model.modules()
        if isinstance(module, nn.Conv1d)
    ]
    with capture(model, offload="cpu") as acts:
        model(x)
    for handle in handles:
        handle.remove()
    assert len(acts) == len(expected)
    for output, reference in zip(acts.values(), expected, strict=True):
        assert torch.equal(output, reference.cpu())
    return acts.nbytes


# -- the tables


def offload_table(model: nn.Module, x: Tensor, rate: float, rounds: int, device: torch.device) -> str:
    """Returns a table of the plain forward, the idioms and convtap on one model."""
    total = check(model, x)
    ways = {
        "plain forward": None,
        "hook, `.detach().cpu()`": hooked(model, lambda output: output.detach().cpu()),
        "hook, `.to('cpu', non_blocking=True)`, one wait at the end": hooked(
            model, lambda output: output.detach().to("cpu", non_blocking=True)
        ),
        "`capture(model, offload='cpu')`": captured(model, offload="cpu"),
        "`capture(model)`, kept on the device": captured(model),
    }
    cases = {name: (lambda way=way: model(x) if way is None else way(x)) for name, way in ways.items()}
    found = measure(cases, rounds, device)  # type: ignore[arg-type]
    (plain, least), rows = found["plain forward"], []
    for name, (seconds, peak) in found.items():
        median = statistics.median(seconds)
        moves = name not in ("plain forward", "`capture(model)`, kept on the device")
        ratio = statistics.median(a / b for a, b in zip(seconds, plain, strict=True))
        speed = f"{total / median / 1e9:.1f}" if moves else ""
        share = f"{total / median / rate:.2f}" if moves else ""
        rows.append((name, f"{median * 1e3:.2f}", f"{ratio:.3f}", speed, share, f"{(peak - least) / MIB:.0f}"))
    columns = ("", "ms (median)", "÷ plain", "GB/s", "share of the ceiling", "device memory above plain, MiB")
    return f"{total / MIB:.0f} MiB of outputs a forward.\n\n" + markdown(columns, rows)


def window_table(model: nn.Module, x: Tensor, total: int, rate: float, rounds: int, device: torch.device) -> str:
    """Returns a table of the same for other window sizes."""
    sizes = [16, 64, 128, 256, 512]
    ways = {size: captured(model, offload="cpu", window=size * MIB) for size in sizes}
    cases = {str(size): (lambda way=way: way(x)) for size, way in ways.items()}
    found = measure(cases, rounds, device)  # type: ignore[arg-type]
    rows = [(f"{name} MiB", f"{total / statistics.median(seconds) / rate:.2f}") for name, (seconds, _) in found.items()]
    return markdown(("window", "share of the ceiling"), rows)


def keeping_table(model: nn.Module, x: Tensor, rounds: int, device: torch.device) -> str:
    """Returns a table of the costs of detaching, copying and cloning on the device."""
    ways = {
        "plain forward": None,
        "hook, `.detach()` (in-place operations overwrite it)": hooked(model, lambda output: output.detach()),
        "hook, `.detach().clone()`": hooked(model, lambda output: output.detach().clone()),
        "`capture(model, copy=False)`": captured(model, copy=False),
        "`capture(model)`": captured(model),
    }
    cases = {name: (lambda way=way: model(x) if way is None else way(x)) for name, way in ways.items()}
    found = measure(cases, rounds, device)  # type: ignore[arg-type]
    (plain, least), rows = found["plain forward"], []
    for name, (seconds, peak) in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, plain, strict=True))
        rows.append((name, f"{statistics.median(seconds) * 1e3:.2f}", f"{ratio:.3f}", f"{(peak - least) / MIB:.0f}"))
    return markdown(("", "ms (median)", "÷ plain", "device memory above plain, MiB"), rows)


def tiny_table(rounds: int, device: torch.device) -> str:
    """Returns a table of the costs of one small output."""
    model, x = tiny(device)
    check(model, x)
    ways = {
        "hook, `.detach().cpu()`": hooked(model, lambda output: output.detach().cpu()),
        "`capture(model, offload='cpu')`": captured(model, offload="cpu"),
        "`capture(model)`": captured(model),
    }
    cases = {"plain": lambda: model(x), **{name: (lambda way=way: way(x)) for name, way in ways.items()}}
    found = measure(cases, rounds, device)  # type: ignore[arg-type]
    plain = statistics.median(found["plain"][0])
    rows = [(name, f"{(statistics.median(found[name][0]) - plain) / 256 * 1e6:.1f}") for name in ways]
    return markdown(("", "added, µs an output"), rows)


def living_table(rate: float) -> str:
    """Returns a table of the costs of pinning, and of moving to pageable memory."""
    empty_cache = getattr(torch._C, "_host_emptyCache", lambda: None)
    pinning, moving = [], []
    for _ in range(7):
        empty_cache()
        start = time.perf_counter()
        slab = torch.empty(SLAB, dtype=torch.uint8, pin_memory=True)
        pinning.append(time.perf_counter() - start)
        start = time.perf_counter()
        moved = slab.clone()
        moving.append(time.perf_counter() - start)
        del slab, moved
    rows = [
        ("copying it from the device (the ceiling)", f"{SLAB / rate * 1e3:.2f}"),
        ("pinning it (torch's cache of pinned memory emptied before)", f"{statistics.median(pinning) * 1e3:.2f}"),
        (f"moving it to pageable memory ({torch.get_num_threads()} threads)", f"{statistics.median(moving) * 1e3:.2f}"),
    ]
    return markdown((f"a slab of {SLAB // MIB} MiB", "ms (median)"), rows)


def report(device: torch.device, rounds: int) -> str:
    """Measures everything."""
    properties = torch.cuda.get_device_properties(device)
    rate = ceiling(device)
    parts = [
        f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB), torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, Python {platform.python_version()}, {rounds} interleaved rounds. "
        f"Window {WINDOW // MIB} MiB, at most {pinned_limit() / 2**30:.1f} GiB pinned in a capture.",
        f"**Ceiling**: {rate / 1e9:.1f} GB/s into pinned memory, in copies of 64 MiB "
        f"({ceiling(device, 1 * MIB, 256) / 1e9:.1f} GB/s in copies of 1 MiB).",
    ]
    with torch.no_grad():
        model, x = transfer_bound(device)
        total = check(model, x)
        parts += ["### Limited by the bus (bar: 0.9 of the ceiling)", offload_table(model, x, rate, rounds, device)]
        parts += ["### The window, same model", window_table(model, x, total, rate, rounds, device)]
        parts += ["### Keeping on the device, same model", keeping_table(model, x, rounds, device)]
        del model, x
        model, x = compute_bound(device, rate)
        parts += [
            f"### Limited by computing, kernel {model[0].kernel_size[0]} (bar: 1.05 × plain)",  # type: ignore[index]
            offload_table(model, x, rate, rounds, device),
        ]
        del model, x
        parts += ["### Small outputs", tiny_table(rounds, device)]
        parts += ["### Where finished results live", living_table(rate)]
    return "\n\n".join(parts)


def main() -> None:
    """Measures all cases and writes the section."""
    parser = argparse.ArgumentParser(description="Measures offloading on a CUDA device.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False
        torch.cuda.set_device(options.device)
        body = report(torch.device(options.device), options.rounds)
    else:
        body = (
            "The CUDA rows were not run, since no CUDA device was available. `python -m benchmarks.offload` on a machine with "
            "one writes them here. Until then the speed of offloading is unknown. Its correctness was tested on fake streams "
            "(`tests/test_offload.py`), but not on CUDA."
        )
    write_section("Offload", body)


if __name__ == "__main__":
    main()
