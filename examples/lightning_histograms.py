"""Writes histograms of each convolution's output from a Lightning callback.

    pip install lightning tensorboard
    python examples/lightning_histograms.py [folder]
    tensorboard --logdir runs

The callback opens a capture for one training step in ``every``. All other steps and the validation run without it.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from convtap import capture


class Histograms(lightning.Callback):
    """Writes histograms in steps 0, n, 2n, …, of the first batch of each such step."""

    def __init__(self, every: int = 50) -> None:
        self.every, self.step, self.acts, self.stack = every, -1, None, ExitStack()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step % self.every == 0 and trainer.global_step != self.step:
            self.step = trainer.global_step
            self.acts = self.stack.enter_context(capture(module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.stack.close()
        for name, output in (self.acts or {}).items():
            if output.isfinite().any():  # TensorBoard rejects a histogram with only NaN
                trainer.logger.experiment.add_histogram(name, output, self.step)
        self.acts = None

    def on_exception(self, trainer, module, exception):
        self.stack.__exit__(type(exception), exception, exception.__traceback__)


class Classifier(lightning.LightningModule):
    """Tells fast from slow oscillations in signals (B, 1, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 8, 7, stride=2, padding=3),
            nn.ReLU(inplace=True),
            nn.Conv1d(8, 16, 5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(16, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        loss = F.cross_entropy(self(x), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def signals(count: int, samples: int = 128) -> TensorDataset:
    """Returns oscillations (1, T) of 4 to 5 or 8 to 9 periods, with their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=generator)
    periods = 4 + 4 * labels + torch.rand(count, generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    x = (2 * torch.pi * (periods[:, None] * torch.linspace(0, 1, samples) + phase)).sin()
    return TensorDataset(x.unsqueeze(1), labels)


def train(folder: str, steps: int = 200, every: int = 50, **options: Any) -> Classifier:
    """Trains on the CPU and writes to the folder.

    Args:
        folder: the folder of the TensorBoard files.
        steps: the number of training steps.
        every: the number of steps from one histogram to the next.
        options: options of Lightning's ``Trainer``.
    """
    lightning.seed_everything(0, verbose=False)
    model = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[Histograms(every), *options.pop("callbacks", [])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(model, DataLoader(signals(1024), batch_size=16, shuffle=True))
    return model


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning")
