"""Implements ``convtap demo``: five Conv1d layers, and an audio encoder."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convtap._capture.capture import capture
from convtap._capture.list_layers import list_layers
from convtap._cli.run_folder import make_folder
from convtap._cli.sound import read_sound
from convtap._errors import InvalidValue, MissingExtra
from convtap._result.activations import Activations
from convtap._table import Table, human_bytes
from convtap._tensors.statistics import shapes_text, statistics
from convtap._time.timeline import timeline

SPEECH = Path(__file__).parent.parent / "data" / "speech.wav"


def five_layers() -> nn.Sequential:
    """Five Conv1d layers, each followed by an in-place ReLU: (B, 1, T) → (B, 16, T)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width, channels) in enumerate([(1, 8), (8, 8), (8, 16), (16, 16), (16, 16)], start=1):
        layers[f"conv{i}"] = nn.Conv1d(width, channels, kernel_size=7, padding=3)
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def ecg(inputs: int = 3, seconds: float = 2.0, sample_rate: int = 250) -> Tensor:
    """Generates ECG-like signals (B, 1, T).

    A heartbeat is a sum of five bumps: the P, Q, R, S and T waves.
    """
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    waves = [(0.20, 0.025, 0.15), (0.33, 0.010, -0.12), (0.36, 0.011, 1.0), (0.39, 0.010, -0.25), (0.60, 0.045, 0.30)]
    rates = torch.linspace(60, 100, inputs) / 60
    phase = (time * rates[:, None]) % 1.0
    signal: Tensor | int = sum(
        height * torch.exp(-((phase - centre) ** 2) / (2 * width**2)) for centre, width, height in waves
    )
    assert isinstance(signal, Tensor)
    drift = 0.05 * torch.sin(2 * math.pi * 0.3 * time)
    return (signal + drift).unsqueeze(1)


class AudioEncoder(nn.Module):
    """An untrained encoder like wav2vec 2.0: (B, T) → (B, T / 320, width).

    It has seven strided Conv1d layers over the waveform, and a positional one. The kernels and strides are those of Baevski
    et al., 2020 (arXiv:2006.11477), section 4.2, with one frame per 20 ms at 16 kHz.
    """

    KERNELS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))

    def __init__(self, channels: int = 64, width: int = 96) -> None:
        super().__init__()
        self.feature_extractor = nn.ModuleList()
        for i, (kernel, stride) in enumerate(self.KERNELS):
            conv = nn.Conv1d(channels if i else 1, channels, kernel, stride, bias=False)
            norm = nn.GroupNorm(channels, channels) if i == 0 else nn.Identity()
            nn.init.kaiming_normal_(conv.weight)
            self.feature_extractor.append(nn.ModuleDict({"conv": conv, "norm": norm, "act": nn.GELU()}))
        self.projection = nn.Linear(channels, width)
        self.position = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(width, width, 128, padding=64, groups=16), dim=2
        )

    def forward(self, waveform: Tensor) -> Tensor:
        """Encodes waveforms (B, T) as frames (B, T / 320, width)."""
        x = waveform.unsqueeze(1)
        for layer in self.feature_extractor:
            assert isinstance(layer, nn.ModuleDict)
            x = layer["act"](layer["norm"](layer["conv"](x)))
        x = self.projection(x.transpose(1, 2)).transpose(1, 2)
        position = self.position(x)[..., : x.shape[-1]]
        frames: Tensor = x + nn.functional.gelu(position)
        return frames.transpose(1, 2)


def per_input(acts: Activations) -> Table:
    """Tabulates the shape (C, T) and range of each layer's output, for each input."""
    rows: list[tuple[Any, ...]] = []
    for i, sample in enumerate(acts.samples()):
        rows.extend((i, name, shapes_text(output.shape), *statistics(output)[:3]) for name, output in sample.items())
    return Table(("input", "layer", "shape", "min", "mean", "max"), rows)


def run(out: Path, sound: str | None = None) -> list[str]:
    """Runs the demo, writes its files into a folder and returns the text to print.

    Raises:
        StoreError: the sound cannot be read, or the folder cannot be written.
        InvalidValue: the sound is too short.
    """
    path = Path(sound) if sound else SPEECH
    waveform, rate = read_sound(path)
    if waveform.shape[-1] < 400:
        raise InvalidValue(
            f"{str(path)!r} has {waveform.shape[-1]} samples, but one frame of the encoder needs 400. Pass a longer sound."
        )
    torch.manual_seed(0)
    make_folder(out)
    return [*_five(out), "", *_sound(out, path.name, waveform, rate)]


def _five(out: Path) -> list[str]:
    model, x = five_layers().eval(), ecg()
    with torch.no_grad(), capture(model) as acts:
        model(x)
    path = out / "five_layers.safetensors"
    acts.save(path)
    pictures = _pictures(acts, out / "five_layers", model, x, 250)
    return [
        f"1. Five Conv1d layers, {len(x)} ECG-like inputs of shape {tuple(x.shape)}",
        "",
        "    with capture(model) as acts:",
        "        model(x)",
        "",
        "The output of each layer:",
        str(acts.summary(stats=True)),
        "",
        "For each input:",
        str(per_input(acts)),
        "",
        *_saved(path, "conv5"),
        *pictures,
    ]


def _sound(out: Path, name: str, waveform: Tensor, rate: int) -> list[str]:
    model = AudioEncoder().eval()
    with torch.no_grad(), capture(model) as acts:
        model(waveform)
    saved = out / "audio_encoder.safetensors"
    acts.save(saved)
    pictures = _pictures(acts, out / "audio_encoder", model, waveform, rate)
    seconds = waveform.shape[-1] / rate
    return [
        f"2. An audio encoder on {name}: {len(waveform)} channel(s), {seconds:.2f} s at {rate} Hz",
        "",
        str(list_layers(model)),
        "",
        str(acts.summary(stats=True)),
        "",
        *_saved(saved, "position"),
        *pictures,
    ]


def _pictures(acts: Activations, path: Path, model: nn.Module, signal: Tensor, rate: int) -> list[str]:
    """Writes the pictures and the report. Returns the lines to print."""
    times = timeline(model, signal)
    report, picture = path.with_suffix(".html"), path.with_suffix(".png")
    acts.report(report, model=model, signal=signal, sample_rate=rate, timeline=times)
    lines = ["", f"The report: {report} (open it in a browser)"]
    try:
        acts.plot(signal=signal, sample_rate=rate, timeline=times).savefig(picture)
    except MissingExtra as error:
        return [*lines, f"No picture of the feature maps: {error}"]
    return [*lines, f"The feature maps of the first input: {picture}"]


def _saved(path: Path, key: str) -> list[str]:
    return [
        f"Saved to {path} ({human_bytes(path.stat().st_size)}). Load it with",
        "",
        "    from convtap import load",
        f"    acts = load({str(path)!r})",
        f"    acts[{key!r}]  # a tensor",
        "    acts.sample(0)  # the outputs for the first input, by layer",
    ]
