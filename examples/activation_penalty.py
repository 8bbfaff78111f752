"""Penalizes activations in the loss, without a change to the network's code.

    python examples/activation_penalty.py

``detach=False`` keeps the captured tensors in the autograd graph, so a loss can use them. ``at="activation"`` captures the
output of the ReLU after each convolution. An L1 penalty on these outputs makes most activations zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap import capture


def network() -> nn.Sequential:
    """Returns a classifier of signals (B, 1, T) with in-place activations."""
    return nn.Sequential(
        nn.Conv1d(1, 8, 7, stride=2, padding=3),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 16, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def penalized_loss(model: nn.Module, x: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Returns the cross entropy plus the mean magnitude of each layer's activation."""
    with capture(model, at="activation", detach=False) as acts:
        logits = model(x)
    return F.cross_entropy(logits, labels) + strength * sum(output.abs().mean() for output in acts.values())


def signals(count: int, generator: torch.Generator, samples: int = 128) -> tuple[Tensor, Tensor]:
    """Returns oscillations (B, 1, T) of 4 to 5 or 8 to 9 periods, with their labels."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    periods = 4 + 4 * labels + torch.rand(count, generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    x = (2 * torch.pi * (periods[:, None] * torch.linspace(0, 1, samples) + phase)).sin()
    return x.unsqueeze(1), labels


def train(strength: float, steps: int = 300) -> nn.Sequential:
    """Trains a network with the penalty."""
    torch.manual_seed(0)
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        penalized_loss(model, *signals(32, generator), strength).backward()
        optimizer.step()
    return model


def measure(model: nn.Module) -> tuple[float, dict[str, float]]:
    """Returns the accuracy on new signals and each layer's share of zero activations."""
    x, labels = signals(500, torch.Generator().manual_seed(1))
    with torch.no_grad(), capture(model, at="activation") as acts:
        right = model(x).argmax(-1) == labels
    return float(right.float().mean()), {name: float((output == 0).float().mean()) for name, output in acts.items()}


def main() -> None:
    for strength in (0.0, 1.0):
        accuracy, zeros = measure(train(strength))
        shares = ", ".join(f"layer {name} {share:.0%}" for name, share in zeros.items())
        print(f"penalty {strength}: accuracy {accuracy:.1%}; activations that are zero: {shares}")


if __name__ == "__main__":
    main()
