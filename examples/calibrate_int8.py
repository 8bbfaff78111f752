"""Calibrates the int8 ranges of a Conv1d network from statistics of a data set.

    python examples/calibrate_int8.py

Static quantization needs the range of every activation. ``statistics`` collects quantiles of each layer over a
calibration set of any size, in memory that does not grow with it. If values have rare outliers, clipping at the 0.1 % and
99.9 % quantiles instead of the minimum and the maximum costs little, and leaves finer steps for the other values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap import Statistics, statistics


def network() -> nn.Sequential:
    """Returns three convolutions over signals (B, 1, T)."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(32, 8, 3, padding=1),
    ).eval()


def signals(count: int, generator: torch.Generator) -> Tensor:
    """Returns noise (N, 1, 400) with rare clicks that are fifty times as high."""
    x = torch.randn(count, 1, 400, generator=generator)
    x[::8, 0, 200] = 50.0
    return x


def ranges(stats: Statistics, share: float) -> dict[str, tuple[float, float]]:
    """Returns the range of each layer without this share of the values at each end."""
    found = {}
    for name, layer in stats.items():
        low, high = layer.quantile((share, 1 - share)).tolist()
        found[name] = (min(low, 0.0), max(high, 0.0))  # padding needs a step at zero
    return found


class Quantized(nn.Module):
    """The network, with layer outputs rounded to the 256 steps of int8."""

    def __init__(self, model: nn.Sequential, limits: dict[str, tuple[float, float]]) -> None:
        super().__init__()
        self.model = model
        self.limits = limits

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.model.named_children():
            x = layer(x)
            if name in self.limits:
                low, high = self.limits[name]
                scale = (high - low) / 255
                x = torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale) - 128, -128, 127)
        return x


def noise_db(model: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    """Returns the signal-to-quantization-noise ratio of the output in dB."""
    with torch.no_grad():
        y, z = model(x), quantized(x)
    return float(10 * torch.log10(y.square().mean() / F.mse_loss(z, y)))


def calibrated(model: nn.Module, batches: list[Tensor]) -> Statistics:
    """Returns the statistics of each layer as a whole, over all batches."""
    with torch.no_grad(), statistics(model, per="layer", quantiles=0.005) as stats:
        for x in batches:
            model(x)
    return stats


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = network()
    stats = calibrated(model, [signals(32, generator) for _ in range(20)])
    print(stats)
    test = signals(64, generator)
    quiet = test[torch.arange(64) % 8 != 0]  # the signals without a click
    for share in (0.0, 0.001):
        quantized = Quantized(model, ranges(stats, share))
        print(f"\nclipped at {share:.1%}: {noise_db(model, quantized, quiet):.1f} dB on signals without a click")
        for name, (low, high) in quantized.limits.items():
            print(f"  layer {name}: {low:8.3f} to {high:8.3f}, steps of {(high - low) / 255:.4f}")


if __name__ == "__main__":
    main()
