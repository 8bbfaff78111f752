"""Recovers a planted DNA motif from the windows that drive a channel most.

    python examples/motifs.py

Half of the sequences contain the motif TGACTCA, with one letter in twenty wrong. A small network learns to classify the
sequences. ``top`` then finds the windows of the whole data set for which the most useful channel is highest. Their position
frequency matrix shows the motif.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from convtap import top

MOTIF = "TGACTCA"
LETTERS = "ACGT"


class MotifNet(nn.Module):
    """A convolution over one-hot DNA (B, 4, T), a maximum and a linear layer."""

    def __init__(self, channels: int = 8, kernel: int = 11) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, channels, kernel, padding=kernel // 2)
        self.head = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).amax(-1)).squeeze(-1)


def make_data(count: int = 1024, length: int = 120) -> tuple[Tensor, Tensor]:
    """Returns random one-hot sequences (N, 4, T), and whether each has the motif."""
    letters = torch.randint(0, 4, (count, length))
    motif = torch.tensor([LETTERS.index(letter) for letter in MOTIF])
    has = torch.arange(count) % 2 == 0
    for row in range(0, count, 2):
        at = int(torch.randint(0, length - len(MOTIF), (1,)))
        noise = torch.rand(len(MOTIF)) < 0.05
        letters[row, at : at + len(MOTIF)] = torch.where(noise, torch.randint(0, 4, (len(MOTIF),)), motif)
    return F.one_hot(letters, 4).transpose(1, 2).float(), has.float()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 15) -> float:
    """Trains the network and returns its accuracy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return float(((model(x) > 0) == y.bool()).float().mean())


def frequency_matrix(windows: list[Tensor]) -> Tensor:
    """Returns the share of each letter at each position of the windows, (4, W)."""
    return torch.stack(windows).mean(0)


def consensus(matrix: Tensor) -> str:
    """Returns the most frequent letters, in lower case for shares below one half."""
    best = matrix.max(0)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return "".join(LETTERS[i] if share >= 0.5 else LETTERS[i].lower() for i, share in pairs)


def main() -> None:
    torch.manual_seed(1)
    x, y = make_data()
    model = MotifNet()
    print(f"trained: {train(model, x, y):.1%} of the sequences told right")

    channel = int(model.head.weight[0].argmax())
    data = DataLoader(TensorDataset(x, y), batch_size=128)
    hits = top(model, data, "conv", 100, channels=channel)
    print(f"\nthe 3 highest of {len(hits)} hits of channel {channel}")
    for hit in hits[:3]:
        print(f"  sample {hit.sample:4}  {hit.start:3} to {hit.stop:3}  value {hit.value:.2f}")

    windows = [hit.window(x) for hit in hits]
    matrix = frequency_matrix([window.values for window in windows if window.inside.all()])
    print("\nposition frequency matrix")
    print("     " + "  ".join(f"{place:>4}" for place in range(matrix.shape[1])))
    for letter, row in zip(LETTERS, matrix.tolist(), strict=True):
        print(f"  {letter}  " + "  ".join(f"{share:4.2f}" for share in row))
    found = consensus(matrix)
    print(f"\nconsensus {found}, and {MOTIF} was planted: {'recovered' if MOTIF in found else 'not recovered'}")


if __name__ == "__main__":
    main()
