"""Captures each layer's output in the three kinds of networks that people rewrite.

    python examples/three_ways.py

To get the outputs of five Conv1d layers for each input, the usual advice is to rewrite the network: a Keras model with
several outputs, an ``nn.ModuleList`` with a forward that returns a list, or a loop over ``F.conv1d`` that collects outputs.
Here each of the three networks stays the same, and ``capture`` returns the tensors. The Keras part needs keras.
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap import Activations, capture

SIZES = ((1, 8), (8, 8), (8, 16), (16, 16), (16, 16))


class ModuleListNetwork(nn.Module):
    """Five Conv1d layers with activations in an nn.ModuleList: (B, 1, T) → (B, 16, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, 5, padding=2) for width, channels in SIZES)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.act(conv(x))
        return x


class FunctionalNetwork(nn.Module):
    """The same network without layers, as weights and ``F.conv1d`` in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(channels, width, 5) * 0.2 for width, channels in SIZES)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.relu(F.conv1d(x, weight, padding=2), inplace=True)
        return x


def keras_network():
    """Returns the same network as a Keras 3 model: (B, T, 1) → (B, T, 16)."""
    import keras

    x = inputs = keras.Input((200, 1))
    for i, (_, channels) in enumerate(SIZES, start=1):
        x = keras.layers.Conv1D(channels, 5, padding="same", activation="relu", name=f"conv{i}")(x)
    return keras.Model(inputs, x)


def captured(model, x, **options) -> Activations:
    """Runs a model on a batch and returns the outputs of its five convolutions."""
    with torch.no_grad(), capture(model, **options) as acts:
        model(x)
    return acts


def main() -> None:
    """Prints the outputs of each network's layers, in total and for the second input."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, 200)
    networks = {"nn.ModuleList": (ModuleListNetwork(), x), "F.conv1d in a loop": (FunctionalNetwork(), x)}
    if importlib.util.find_spec("keras") is not None:
        os.environ["KERAS_BACKEND"] = "torch"
        networks["Keras"] = (keras_network(), x.transpose(1, 2).numpy())
    for name, (model, batch) in networks.items():
        acts = captured(model, batch)
        print(f"{name}\n{acts}")
        print("for input 1:", {layer: tuple(output.shape) for layer, output in acts.sample(1).items()}, "\n")


if __name__ == "__main__":
    main()
