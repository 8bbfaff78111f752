"""1-D Grad-CAM: which beat made the network say "abnormal"?

The example generates ECG-like signals, half of them with one wide beat, and trains a small network to find these in seconds.
The gradient of its decision, at the output of its last convolution, shows which times the decision depends on (Selvaraju et
al., 2017, arXiv:1610.02391, equations 1 and 2, with time instead of the two axes of an image). The timeline maps the frames
of that layer to the samples of the input.

    python examples/grad_cam_1d.py [picture.png]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap import LayerTime, capture, timeline

SAMPLES, BEATS = 512, 5
SPACING = SAMPLES // BEATS
SECOND = 28  # samples from a beat to its second wave


def signals(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Generates signals of five beats, half of them with one wide beat.

    Returns:
        The signals (count, 1, 512), their labels (count,), which are 1 if a beat is wide, and the centres of these beats in
        samples.
    """
    time = torch.arange(SAMPLES, dtype=torch.float32)
    labels = torch.arange(count) % 2
    which = torch.randint(0, BEATS, (count,), generator=generator)
    jitter = torch.randint(-12, 13, (count, BEATS), generator=generator)
    centres = torch.arange(BEATS) * SPACING + SPACING // 2 + jitter
    found = 0.05 * torch.randn(count, SAMPLES, generator=generator)
    for beat in range(BEATS):
        since = time - centres[:, beat, None]
        narrow = torch.exp(-(since**2) / (2 * 3.0**2)) + 0.2 * torch.exp(-((since - SECOND) ** 2) / (2 * 8.0**2))
        wide = 0.9 * torch.exp(-(since**2) / (2 * 9.0**2)) - 0.4 * torch.exp(-((since - SECOND) ** 2) / (2 * 8.0**2))
        abnormal = (labels == 1) & (which == beat)
        found += torch.where(abnormal[:, None], wide, narrow)
    return found.unsqueeze(1), labels, centres.gather(1, which[:, None]).squeeze(1)


def network() -> nn.Sequential:
    """Returns three convolutions with in-place activations and a linear classifier."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 15, stride=2, padding=7),
        nn.ReLU(inplace=True),
        nn.Conv1d(16, 16, 9, stride=2, padding=4),
        nn.ReLU(inplace=True),
        nn.Conv1d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    )


def train(steps: int = 100) -> nn.Sequential:
    """Trains the network on fresh signals at every step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, labels, _ = signals(32, generator)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def grad_cam(model: nn.Module, x: Tensor, layer: str, target: int) -> Tensor:
    """Returns the relevance (B, frames) of a layer's frames for a class.

    Args:
        x: the input, (B, 1, T).
        layer: the name of a convolution.
        target: the class.
    """
    with capture(model, layer, grads=True) as acts:
        model(x)[:, target].sum().backward()
    call = acts.calls(layer)[0]
    weights = call.grad.mean(-1, keepdim=True)  # (B, C, 1): how much each channel counts for the class
    # The layer's own output: the in-place ReLU after it does not change captured values.
    return (weights * call.output.relu()).sum(1).relu()


def on_samples(relevance: Tensor, layer: LayerTime, samples: int) -> Tensor:
    """Interpolates a map over frames (B, frames) to input samples (B, samples).

    Each frame's value lies at the frame's centre, with straight lines between centres. Before the first centre and after the
    last one, the map falls to zero at the end of the frame's span. Stretching the map to the input's length would be correct
    only for frames that are spread evenly over the whole input. Padding on one side, or none, shifts them.
    """
    last, sample = relevance.shape[1] - 1, torch.arange(samples)
    first_centre, last_centre = float(layer.centre(0)), float(layer.centre(last))
    place = ((sample - first_centre) / float(layer.stride)).clamp(0, last)  # in frames
    before = place.floor().long()
    found = torch.lerp(relevance[:, before], relevance[:, (before + 1).clamp(max=last)], place - before)
    start, stop = layer.span(0)[0] - 1, layer.span(last)[1]  # the nearest samples that no frame sees
    fade = torch.minimum((sample - start) / (first_centre - start), (stop - sample) / (stop - last_centre))
    return found * fade.clamp(0, 1)


def draw(x: Tensor, relevance: Tensor, centre: int, path: Path) -> None:
    """Draws a signal (T,) with its wide beat, and the relevance of its samples (T,)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.axvspan(centre - SPACING / 2, centre + SPACING / 2, color="0.92", label="the planted wide beat")
    axes.plot(x, color="0.2", linewidth=1)
    axes.set_ylabel("signal")
    axes.set_title("1-D Grad-CAM for “abnormal”, at the last convolution")
    axes.set_ylim(-0.7, 1.6)  # room for the legend
    axes.legend(loc="upper right", frameon=False)
    below.fill_between(range(len(x)), relevance / relevance.max(), color="tab:red", alpha=0.7, linewidth=0)
    below.set_ylabel("relevance")
    below.set_xlabel("sample")
    below.set_ylim(0, 1.05)
    below.set_xlim(0, SAMPLES)
    for plot in (axes, below):
        plot.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(path: Path) -> None:
    """Trains a network, and measures and draws the relevance."""
    model = train()
    x, labels, centres = signals(200, torch.Generator().manual_seed(2))
    accuracy = (model(x).argmax(1) == labels).float().mean().item()
    x, centres = x[labels == 1], centres[labels == 1]
    layer = timeline(model, x[:1])["4"]
    relevance = on_samples(grad_cam(model, x, layer="4", target=1), layer, SAMPLES)
    inside = (torch.arange(SAMPLES) - centres[:, None]).abs() <= SPACING / 2
    share = ((relevance * inside).sum(1) / relevance.sum(1)).mean().item()
    after = (relevance.argmax(1) - centres).median().item()
    print(f"accuracy {accuracy:.1%}; {share:.0%} of the relevance is on the planted beat, one fifth of the signal")
    print(f"the highest is {after} samples after the beat (median); the beat's inverted wave is {SECOND} after it")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    draw(x[0, 0], relevance[0], int(centres[0]), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "grad_cam_1d.png"))
