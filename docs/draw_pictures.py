"""Draws the pictures of ``docs/pictures.md``: ``python -m docs.draw_pictures``.

It takes a minute and needs convtap[plot]. It trains two small networks: one finds early heartbeats, and the other finds a motif
in DNA.
"""

from __future__ import annotations

import io
import math
import wave
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap import capture, timeline, top
from convtap.plot import channels, distributions, pages, windows
from examples import motifs

FOLDER = Path(__file__).parent / "pictures"
SPEECH = Path(__file__).parent.parent / "src" / "convtap" / "data" / "speech.wav"
RATE = 250  # samples per second of the ECG

#: The waves of a heartbeat: seconds after its R peak, width in seconds, height in mV.
WAVES = ((-0.17, 0.025, 0.15), (-0.03, 0.010, -0.12), (0.0, 0.011, 1.0), (0.03, 0.010, -0.25), (0.25, 0.045, 0.30))


def heartbeats(count: int, seconds: int = 8) -> tuple[Tensor, Tensor]:
    """Returns ECG-like signals (B, 1, T) in mV, and a mask of early beats (B, T)."""
    time = torch.arange(seconds * RATE) / RATE
    signals, early = torch.zeros(count, len(time)), torch.zeros(count, len(time))
    for row in range(count):
        at = 0.4
        while at < seconds:
            is_early = at > 1 and torch.rand(()) < 0.2
            at -= 0.25 if is_early else 0.0
            for offset, width, height in WAVES:
                wide = 3.0 if is_early else 1.0
                bump = torch.exp(-((time - at - wide * offset) ** 2) / (2 * (wide * width) ** 2))
                signals[row] += height * (0.9 if is_early else 1.0) * bump
            if is_early:
                early[row] = torch.maximum(early[row], ((time - at).abs() < 0.1).float())
            at += 0.8 + 0.04 * float(torch.randn(())) + (0.35 if is_early else 0.0)
    drift = 0.05 * torch.sin(2 * math.pi * 0.3 * time)
    return (signals + drift + 0.03 * torch.randn_like(signals)).unsqueeze(1), early


class BeatNet(nn.Module):
    """Four convolutions that detect early beats: (B, 1, T) → (B, T / 4).

    The output is the logit of an early beat in each frame of 16 ms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv1d(1, 16, 15, stride=2, padding=7), nn.ReLU()),
            *(nn.Conv1d(16, 24, 15, stride=2, padding=7), nn.ReLU()),
            *(nn.Conv1d(24, 24, 15, padding=7), nn.ReLU()),
        )
        self.head = nn.Conv1d(24, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).squeeze(1)


def trained() -> BeatNet:
    """Returns a network that finds early beats."""
    model = BeatNet()
    x, early = heartbeats(96)
    target = early[:, ::4]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(25):
        for rows in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[rows]), target[rows]).backward()
            optimizer.step()
    return model.eval()


def save(figure: Any, name: str) -> None:
    """Writes a picture with 128 colours, which takes a third of the bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(FOLDER / name, optimize=True)


def draw_heartbeats() -> None:
    """Draws the maps, span, channels, distributions and windows of the ECG network."""
    model = trained()
    x, early = heartbeats(12)
    row = int(early.sum(1).gt(0).nonzero()[0])  # the first input with an early beat
    start = float(early[row].argmax()) / RATE - 1.2
    with torch.no_grad(), capture(model, types=(nn.Conv1d, nn.ReLU)) as acts:
        model(x)
    alive = acts["encoder.5"].std((0, 2)).argsort(descending=True)[:8].sort().values.tolist()
    options: dict[str, Any] = {"sample": row, "signal": x, "sample_rate": RATE, "timeline": timeline(model, x)}
    few, beat = ["encoder.1", "encoder.4", "head"], (round(start, 1), round(start + 2, 1))
    save(acts.plot(layers=few, **options), "maps.png")
    save(acts.plot(layers=few, span=beat, **options), "span.png")
    save(channels(acts, "encoder.5", channels=alive, **options), "channels.png")
    save(distributions(acts), "distributions.png")
    save(windows(top(model, x, "encoder.4", 4, channels=[4, 11]), x, sample_rate=RATE), "windows.png")


def draw_motifs() -> None:
    """Draws the windows of DNA that drive a network trained on a motif most."""
    x, y = motifs.make_data()
    model = motifs.MotifNet()
    motifs.train(model, x, y)
    channel = int(model.head.weight[0].argmax())
    save(windows(top(model, x, "conv", 12, channels=channel), x, letters="ACGT"), "letters.png")


def draw_index() -> None:
    """Draws the index of an encoder of 74 layers over speech."""
    with wave.open(str(SPEECH)) as file:
        rate = file.getframerate()
        data = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
    x = (data.float() / 2**15)[None, None]
    layers: list[nn.Module] = [nn.Conv1d(1, 16, 10, stride=5), nn.GELU()]
    for number in range(36):
        layers += [nn.Conv1d(16, 16, 3, stride=2 if number in (8, 16, 24) else 1, padding=1), nn.GELU()]
    model = nn.Sequential(*layers)
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.6)
        nn.init.zeros_(layer.bias)
    with torch.no_grad(), capture(model, types=(nn.Conv1d, nn.GELU)) as acts:
        model(x)
    save(pages(acts, signal=x, sample_rate=rate, timeline=timeline(model, x))[0], "index.png")


def main() -> None:
    """Draws all pictures, reproducibly."""
    torch.set_num_threads(1)
    for draw in (draw_heartbeats, draw_motifs, draw_index):
        torch.manual_seed(0)
        draw()


if __name__ == "__main__":
    main()
