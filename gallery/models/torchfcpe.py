"""FCPE, a pitch estimator with depthwise convolutions over a mel spectrogram.

The weights are in the wheel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

TITLE = "FCPE, one second of sound"


def load() -> tuple[nn.Module, Callable[[], object]]:
    """Loads the model. It reads a second of a tone that rises from 200 Hz, (B, T, 1)."""
    from torchfcpe import spawn_bundled_infer_model

    model = spawn_bundled_infer_model(device="cpu")
    seconds = torch.arange(16000) / 16000
    signal = 0.3 * torch.sin(2 * math.pi * (200 + 100 * seconds) * seconds)[None, :, None]
    return model, lambda: model.infer(signal, sr=16000)
