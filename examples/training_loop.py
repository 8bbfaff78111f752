"""Writes statistics of each layer's output and gradient from a training loop.

    pip install tensorboard
    python examples/training_loop.py [folder]
    tensorboard --logdir runs

One capture is open around the whole loop. ``keep="last"`` keeps one output per layer, and ``clear`` removes it after each
write, so the memory does not grow with the length of the training.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from convtap import Activations, capture


def network() -> nn.Sequential:
    """Returns a classifier of signals (B, 1, T) with in-place activations."""
    return nn.Sequential(
        nn.Conv1d(1, 8, 7, stride=2, padding=3),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 16, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def write(writer: Any, acts: Activations, step: int) -> None:
    """Writes statistics of the layers' outputs and gradients in the last step."""
    for call in acts.calls():
        output = call.output
        writer.add_scalar(f"{call.name}/mean", output.mean().item(), step)
        writer.add_scalar(f"{call.name}/std", output.std().item(), step)
        dead = (output <= 0).all(-1).all(0).float().mean()  # the share of channels that a ReLU sets to zero everywhere
        writer.add_scalar(f"{call.name}/dead channels", dead.item(), step)
        if call.grad is not None:
            writer.add_scalar(f"{call.name}/gradient norm", call.grad.norm().item(), step)
        writer.add_histogram(f"{call.name}/output", output, step)


def train(writer: Any, steps: int = 1000, every: int = 50, batch: int = 16, samples: int = 128) -> nn.Sequential:
    """Trains a classifier of fast and slow oscillations, and writes statistics.

    Args:
        writer: a ``SummaryWriter``, or an object with its ``add_scalar`` and ``add_histogram``.
        steps: the number of training steps.
        every: the number of steps from one write to the next.
        batch: the number of signals per step.
        samples: the length of the signals.
    """
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    time = torch.linspace(0, 1, samples)
    with capture(model, keep="last", grads=True) as acts:
        for step in range(steps):
            labels = torch.randint(0, 2, (batch,))
            pitch = 4 + 4 * labels + torch.rand(batch)
            x = (2 * torch.pi * (pitch[:, None] * time + torch.rand(batch, 1))).sin().unsqueeze(1)
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % every == 0:
                write(writer, acts, step)
                writer.add_scalar("loss", loss.item(), step)
                acts.clear()
    return model


if __name__ == "__main__":
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(sys.argv[1] if len(sys.argv) > 1 else "runs/convtap") as board:
        train(board)
