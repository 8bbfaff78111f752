"""Measures the cost of a capture beside the plain forward and hooks by hand.

All cases are interleaved in one process. ``python -m benchmarks.overhead`` writes the section "Overhead" of RESULTS.md: 64 tiny
Conv1d layers with a capture for each forward, wav2vec2-base on one second of audio, a Mamba, and a scripted network.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    declare_torchvision_operators,
    environment,
    interleave,
    markdown,
    paired_ratio,
    quartiles,
    write_section,
)
from convtap import capture


def by_hand(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Captures with hooks by hand, whose values later in-place operations overwrite."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output.detach()

        return keep

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def cases(model: nn.Module, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Returns the measured functions by the names of their rows."""

    def captured(**options: object) -> Callable[[], object]:
        def case() -> object:
            with capture(model, **options) as acts:  # type: ignore[arg-type]
                run()
            return acts

        return case

    return {
        "plain forward": run,
        "hooks by hand (not safe from in-place)": lambda: by_hand(model, run),
        "capture": captured(),
        "capture, functional=False": captured(functional=False, strict=False),
    }


def table(model: nn.Module, run: Callable[[], object], rounds: int) -> str:
    """Measures one model.

    The last column is the added time, as a multiple of the time that hooks by hand add, if that is long enough.
    """
    seconds = interleave(cases(model, run), rounds)
    names = list(seconds)
    plain, hand = seconds[names[0]], seconds[names[1]]
    matters = paired_ratio(hand, plain) > 1.1
    added_by_hand = statistics.median(b - a for a, b in zip(plain, hand, strict=True))
    rows = []
    for name, values in seconds.items():
        low, middle, high = quartiles(values)
        added = statistics.median(b - a for a, b in zip(plain, values, strict=True))
        relative = f"{added / added_by_hand:.2f}" if name != names[0] and matters else ""
        unit, scale = ("µs", 1e6) if middle < 5e-3 else ("ms", 1e3)
        spread = f"{low * scale:.1f} – {high * scale:.1f}"
        rows.append((name, f"{middle * scale:.1f} {unit}", spread, f"{paired_ratio(values, plain):.3f}", relative))
    return markdown(("", "median", "quartiles", "÷ plain", "added, ÷ by hand"), rows)


def micro_stack() -> tuple[nn.Module, Callable[[], object]]:
    """64 × Conv1d(8, 8, 3) on (1, 8, 64), which show the overhead."""
    model = nn.Sequential(*(nn.Conv1d(8, 8, 3, padding=1) for _ in range(64))).eval()
    x = torch.randn(1, 8, 64)
    return model, lambda: model(x)


def wav2vec2_base() -> tuple[nn.Module, Callable[[], object]]:
    """wav2vec2-base with random weights on one second at 16 kHz."""
    declare_torchvision_operators()
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    model = Wav2Vec2Model(Wav2Vec2Config()).eval()
    x = torch.randn(1, 16000)
    return model, lambda: model(x)


def mamba() -> tuple[nn.Module, Callable[[], object]]:
    """A Mamba of 8 layers with random weights on 64 tokens.

    It has thousands of torch calls, and its convolutions are called as functions.
    """
    declare_torchvision_operators()
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(hidden_size=64, num_hidden_layers=8, vocab_size=100, use_cache=False)).eval()
    tokens = torch.randint(0, 100, (1, 64))
    return model, lambda: model(tokens)


def scripted() -> tuple[nn.Module, Callable[[], object]]:
    """A scripted network of four convolutions that takes less than a millisecond."""
    layers = [nn.Conv1d(1 if i == 0 else 32, 32, 5, padding=2) for i in range(4)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
    x = torch.randn(1, 1, 2048)
    script = torch.jit.script(model)
    for _ in range(3):  # the executor profiles, then optimizes
        script(x)
    return script, lambda: script(x)


def main() -> None:
    """Measures all models and writes the section."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter(
        "ignore"
    )  # functional=False captures nothing of some models, and torch warns about TorchScript
    rows = (
        ("64 × Conv1d(8, 8, 3) on (1, 8, 64), the capture entered for each forward, 500 rounds", micro_stack, 500),
        ("wav2vec2-base, one second of audio, 30 rounds", wav2vec2_base, 30),
        ("A Mamba, 8 layers, 64 tokens, 100 rounds", mamba, 100),
        ("A scripted network, 4 convolutions, 500 rounds", scripted, 500),
    )
    parts = [
        f"`python -m benchmarks.overhead`. {environment()}. The last column is the time that a row adds, as a multiple of the "
        "time that hooks by hand add."
    ]
    with torch.no_grad():
        for title, make, rounds in rows:
            parts += [title, table(*make(), rounds=rounds)]
    write_section("Overhead", "\n\n".join(parts))


if __name__ == "__main__":
    main()
