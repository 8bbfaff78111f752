"""Extracts features of ragged audio to disk, then trains a probe and k-means.

    python examples/speech_features.py [DIRECTORY]

A second run reuses the features in the directory. The sounds are generated tones that rise or fall, and the direction is the
class. The encoder resembles that of wav2vec2. Replace it with your own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convtap import Store, extract

RATE = 8000


class Tones(Dataset):
    """Noisy tones of 0.3 to 1.2 s that rise (class 1) or fall (class 0)."""

    def __init__(self, length: int = 200) -> None:
        draw = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(int(0.3 * RATE), int(1.2 * RATE), (length,), generator=draw).tolist()
        self.labels = torch.randint(0, 2, (length,), generator=draw).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        draw = torch.Generator().manual_seed(i)
        position = torch.linspace(0, 1, self.lengths[i])
        height = 300 + 900 * (position if self.labels[i] else 1 - position)
        phase = torch.cumsum(2 * torch.pi * height / RATE, 0)
        return torch.sin(phase) + 0.3 * torch.randn(self.lengths[i], generator=draw), self.labels[i]


def padded(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Returns a batch, padded to its longest sound, with the length of each sound."""
    sounds = [sound for sound, _ in items]
    return {
        "audio": nn.utils.rnn.pad_sequence(sounds, batch_first=True),
        "lengths": torch.tensor([len(sound) for sound in sounds]),
        "label": torch.tensor([label for _, label in items]),
    }


def buckets(lengths: list[int], size: int) -> list[list[int]]:
    """Returns batches of sounds of similar length, which need little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


class Encoder(nn.Module):
    """Convolutions as in wav2vec2, with a frame of 64 numbers every 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(1, 64, 10, 5), (64, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 4)]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, kernel, stride) for a, b, kernel, stride in shapes)

    def forward(self, audio: Tensor) -> Tensor:
        x = audio[:, None]
        for conv in self.convs:
            x = nn.functional.gelu(3 * conv(x))
        return x


def features(folder: Path) -> Store:
    """Extracts all real frames of two layers in float16."""
    torch.manual_seed(0)
    sounds = Tones()
    loader = DataLoader(sounds, batch_sampler=buckets(sounds.lengths, 16), collate_fn=padded)
    return extract(
        Encoder(),
        loader,
        folder,
        ["convs.2", "convs.3"],
        inputs=lambda batch: ((batch["audio"],), {}),
        lengths=lambda batch: batch["lengths"],
        labels=lambda batch: batch["label"],
        dtype=torch.float16,
    )


def linear_probe(store: Store, layer: str, epochs: int = 60) -> float:
    """Trains a linear classifier on a layer's first and last frames.

    Returns:
        The accuracy on a quarter of the sounds, which the training does not use.
    """
    data = store.dataset(layer)
    train, test = torch.utils.data.random_split(data, [0.75, 0.25], torch.Generator().manual_seed(0))

    def batches(part: Dataset, shuffle: bool):
        for _, outputs, lengths, labels in DataLoader(part, 32, shuffle=shuffle, collate_fn=data.collate):
            frames, last = outputs[layer].float(), lengths[layer] - 4
            rows = torch.arange(len(frames))
            ends = torch.stack([frames[rows, :, (last + i).clamp(min=0)] for i in range(4)]).mean(0)
            yield torch.cat([frames[:, :, :4].mean(-1), ends], 1), labels

    probe = nn.Linear(2 * store[layer].shape[1], 2)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.01)
    for _ in range(epochs):
        for x, labels in batches(train, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(probe(x), labels).backward()
            optimizer.step()
    with torch.no_grad():
        right = torch.cat([probe(x).argmax(1) == labels for x, labels in batches(test, shuffle=False)])
    return right.float().mean().item()


def kmeans(store: Store, layer: str, k: int = 8, epochs: int = 3) -> Tensor:
    """Fits k centers to all frames of a layer, with only a pool of frames in memory."""
    view = store[layer]
    centers = next(view.frames(1024, seed=1)).float()[:k].clone()
    for epoch in range(epochs):
        counts = torch.zeros(k)
        for frames in view.frames(1024, seed=epoch):
            nearest = torch.cdist(frames.float(), centers).argmin(1)
            for center in nearest.unique().tolist():
                members = frames[nearest == center].float()
                counts[center] += len(members)
                centers[center] += (members.mean(0) - centers[center]) * len(members) / counts[center]
    return centers


def distortion(store: Store, layer: str, centers: Tensor) -> float:
    """Returns the mean squared distance of a frame to its nearest center."""
    total, count = 0.0, 0
    for frames in store[layer].frames(4096, shuffle=False):
        total += torch.cdist(frames.float(), centers).min(1).values.square().sum().item()
        count += len(frames)
    return total / count


def main(folder: Path) -> None:
    store = features(folder)
    print(store)
    print(f"linear probe on convs.2: {linear_probe(store, 'convs.2'):.0%} accuracy on new sounds")
    one, eight = (distortion(store, "convs.2", kmeans(store, "convs.2", k)) for k in (1, 8))
    print(f"k-means on convs.2: 8 centers leave {eight / one:.0%} of the variance of 1")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
