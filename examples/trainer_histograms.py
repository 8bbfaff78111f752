"""Writes histograms of each convolution's output from a Hugging Face callback.

    pip install transformers accelerate tensorboard
    python examples/trainer_histograms.py [folder]
    tensorboard --logdir runs

The callback opens a capture for one training step in ``every``. All other steps and the evaluation run without it. The
``Trainer`` does not tell callbacks that a step raised, so an ``ExitStack`` around the training closes the captures.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments

from convtap import capture


class Histograms(TrainerCallback):
    """Writes histograms in steps 0, n, 2n, …, of the last batch of each such step."""

    def __init__(self, writer: SummaryWriter, stack: ExitStack, every: int = 50) -> None:
        self.writer, self.stack, self.every = writer, stack, every

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            self.acts = self.stack.enter_context(capture(model, keep="last"))

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step - 1  # the Trainer has counted this step already
        if step % self.every == 0:
            self.stack.close()
            for name, output in self.acts.items():
                if output.isfinite().any():  # TensorBoard rejects a histogram with only NaN
                    self.writer.add_histogram(name, output, step)


class Classifier(nn.Module):
    """Tells fast from slow oscillations in signals (B, 1, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, 8, 7, stride=2, padding=3),
            nn.ReLU(inplace=True),
            nn.Conv1d(8, 16, 5, stride=2, padding=2),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(x).mean(-1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def signals(count: int, samples: int = 128) -> list[dict[str, Tensor]]:
    """Returns oscillations (1, T) of 4 to 5 or 8 to 9 periods, with their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=generator)
    periods = 4 + 4 * labels + torch.rand(count, generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    x = (2 * torch.pi * (periods[:, None] * torch.linspace(0, 1, samples) + phase)).sin().unsqueeze(1)
    return [{"x": signal, "labels": label} for signal, label in zip(x, labels, strict=True)]


def train(folder: str, steps: int = 200, every: int = 50, **options: Any) -> Classifier:
    """Trains on the CPU and writes to the folder.

    Args:
        folder: the folder of the TensorBoard files.
        steps: the number of training steps.
        every: the number of steps from one histogram to the next.
        options: options of ``TrainingArguments``.
    """
    torch.manual_seed(0)
    model = Classifier()
    with tempfile.TemporaryDirectory() as checkpoints, SummaryWriter(folder) as writer, ExitStack() as stack:
        arguments = TrainingArguments(
            checkpoints,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=0.01,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            **options,
        )
        callbacks = [Histograms(writer, stack, every)]
        Trainer(model, arguments, train_dataset=signals(1024), callbacks=callbacks).train()
    return model


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer")
