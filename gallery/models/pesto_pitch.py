"""PESTO, a pitch estimator with Conv1d layers over a constant-Q transform.

The weights are in the wheel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gallery.reference import Convolution

TITLE = "PESTO `mir-1k_g7`, one second of sound"


def load() -> tuple[nn.Module, Callable[[], object]]:
    """Loads the model. It reads one second of a tone that rises from 200 Hz."""
    from pesto import load_model

    model = load_model("mir-1k_g7", step_size=10.0, sampling_rate=16000)
    seconds = torch.arange(16000) / 16000
    signal = 0.3 * torch.sin(2 * math.pi * (200 + 100 * seconds) * seconds)[None]
    return model, lambda: model(signal, sr=16000, convert_to_freq=True)


def captured(model: nn.Module, name: str, convolution: Convolution) -> Tensor:
    """Returns the expected value.

    The last layer, a subclass of Conv1d, drops the channel and returns (B, T).
    """
    value = convolution.by_hand()
    return value.squeeze(-2) if name == "encoder.fc" else value
