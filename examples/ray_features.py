"""Extracts features of a ragged audio data set with Ray Data, from and to Parquet.

    python examples/ray_features.py [DIRECTORY]

Each actor of a pool has its own model. If an actor dies, Ray replaces it and computes its batch again. The sounds are
generated. Replace them with your own Parquet files. On GPUs, pass ``num_gpus=1`` to ``map_batches`` and ``"device": "cuda"``
to the extractor.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convtap.ray import Extractor

RATE = 8000


def write_sounds(folder: Path, count: int = 48, files: int = 6) -> None:
    """Writes noisy tones of 0.2 to 0.5 s as Parquet rows: name, length and sound."""
    import pyarrow
    from pyarrow import parquet

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(int(0.2 * RATE), int(0.5 * RATE), (count,), generator=draw).tolist()
    heights = torch.randint(200, 2000, (count,), generator=draw).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        here = range(file, count, files)
        sounds = [
            torch.sin(2 * torch.pi * heights[i] * torch.arange(lengths[i]) / RATE)
            + 0.1 * torch.randn(lengths[i], generator=draw)
            for i in here
        ]
        columns = {
            "name": [f"sound-{i:03d}" for i in here],
            "length": [lengths[i] for i in here],
            "audio": pyarrow.array([sound.numpy() for sound in sounds], pyarrow.list_(pyarrow.float32())),
        }
        parquet.write_table(pyarrow.table(columns), folder / f"sounds-{file}.parquet")


class Encoder(nn.Module):
    """Convolutions as in wav2vec2, on (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 16, 10, 5), (16, 32, 8, 4), (32, 64, 4, 2)]
        self.convs = nn.ModuleList(nn.Conv1d(*size) for size in sizes)

    def forward(self, audio: Tensor) -> Tensor:
        frames = audio[:, None]
        for conv in self.convs:
            frames = torch.relu_(conv(frames))
        return frames


def make_model() -> nn.Module:
    """Returns the encoder. Each actor calls it once. Load real weights here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Encoder()


def pad(batch: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
    """Pads the sounds of a batch to the longest sound."""
    return (nn.utils.rnn.pad_sequence(batch["audio"], batch_first=True),), {}


def mean_over_time(frames: Tensor) -> Tensor:
    """Averages one sound's frames (C, T), which convtap has cut to the real ones."""
    return frames.mean(-1)


def features(sounds: Path, into: Path, actors: int = 2) -> Any:
    """Extracts all layers of the sounds, and returns the written Ray data set."""
    import ray

    ray.data.read_parquet(str(sounds)).map_batches(
        Extractor,
        fn_constructor_args=(make_model,),
        fn_constructor_kwargs={
            "inputs": pad,
            "lengths": "length",
            "reduce": mean_over_time,
            "keep": ["name", "length"],
        },
        batch_size=8,
        # the pool grows with the waiting blocks, so no actor holds a GPU without work
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    ).write_parquet(str(into))
    return ray.data.read_parquet(str(into))


def main() -> None:
    """Writes sounds, extracts their features and prints the first rows."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    write_sounds(folder / "sounds")
    written = features(folder / "sounds", folder / "features")
    print(written.schema())
    for row in written.sort("name").take(3):
        print(row["name"], row["length"], {name: row[name].shape for name in row if name.startswith("convs")})


if __name__ == "__main__":
    main()
