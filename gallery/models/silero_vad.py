"""Silero VAD, a voice activity detector in TorchScript.

The weights are in the wheel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

TITLE = "Silero VAD, TorchScript, 16 chunks of 32 ms"


def load() -> tuple[torch.jit.ScriptModule, Callable[[], object]]:
    """Loads the model. It reads half a second of a 200 Hz tone, chunk by chunk."""
    from silero_vad import load_silero_vad

    model = load_silero_vad()
    seconds = torch.arange(16 * 512) / 16000
    chunks = (0.3 * torch.sin(2 * math.pi * 200 * seconds) + 0.05 * torch.randn(len(seconds))).split(512)

    def run() -> object:
        model.reset_states()
        return [model(chunk, 16000) for chunk in chunks]

    return model, run
