"""Finds dead channels over a data set, and removes them with equal results.

    python examples/dead_channels.py

A channel that is zero after its ReLU for one batch may fire for another batch, so a check needs the whole data set.
``statistics`` covers it batch by batch and keeps no outputs. A channel that is always zero contributes nothing to the next
convolution. Without such channels, the network is smaller and its outputs are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convtap import statistics


def network() -> nn.Sequential:
    """Returns three convolutions. The biases of the first two keep channels negative."""
    model = nn.Sequential(nn.Conv1d(1, 32, 9), nn.ReLU(), nn.Conv1d(32, 64, 5), nn.ReLU(), nn.Conv1d(64, 4, 3)).eval()
    with torch.no_grad():
        model[0].bias[[3, 8, 21]] = -100.0
        model[2].bias[10:20] = -100.0
        model[0].weight[5] *= 0.05
        model[0].bias[5] = -0.5  # fires for loud signals only
    return model


def batches(count: int = 50) -> list[Tensor]:
    """Returns batches of signals (B, 1, T). Only the last batch is loud."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(8, 1, 200, generator=generator) for _ in range(count)]
    found[-1] *= 20
    return found


def dead_channels(model: nn.Module, data: list[Tensor]) -> dict[str, list[int]]:
    """Returns the channels of each ReLU whose value never changed in any batch."""
    with torch.no_grad(), statistics(model, types=nn.ReLU, quantiles=None) as stats:
        for x in data:
            model(x)
    return {name: layer.dead for name, layer in stats.items()}


def without(model: nn.Sequential, dead: dict[str, list[int]]) -> nn.Sequential:
    """Returns the network without its dead channels.

    Each ReLU has a convolution before and after it.
    """
    layers = list(model)
    kept_before: list[int] | None = None
    found = nn.Sequential()
    for place, layer in enumerate(layers):
        if not isinstance(layer, nn.Conv1d):
            found.append(layer)
            continue
        gone = set(dead.get(str(place + 1), ()))
        kept = [channel for channel in range(layer.out_channels) if channel not in gone]
        inputs = range(layer.in_channels) if kept_before is None else kept_before
        smaller = nn.Conv1d(len(inputs), len(kept), layer.kernel_size[0])
        with torch.no_grad():  # a dead channel is zero after the ReLU, so the next layer loses nothing
            smaller.weight.copy_(layer.weight[kept][:, list(inputs)])
            smaller.bias.copy_(layer.bias[kept])
        found.append(smaller)
        kept_before = kept
    return found.eval()


def main() -> None:
    torch.manual_seed(0)
    model, data = network(), batches()
    print("dead in the first batch:  ", dead_channels(model, data[:1]))
    dead = dead_channels(model, data)
    print("dead in the whole data set:", dead)
    smaller = without(model, dead)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, smaller)]
    with torch.no_grad():
        worst = max(float((model(x) - smaller(x)).abs().max()) for x in data)
    print(f"{sizes[0]:,} parameters before, {sizes[1]:,} after; outputs differ by at most {worst:.1e}")


if __name__ == "__main__":
    main()
