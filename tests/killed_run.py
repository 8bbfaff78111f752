"""A small extraction that takes its time, for the tests that kill it; as a script, it is killed and restarted many times."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from convtap._dataset.extract import extract


class Ragged(Dataset):
    """Signals of five lengths; reading one takes a moment, so that a kill meets the run at work."""

    def __init__(self, length=120, pause=0.0):
        self.length = length
        self.pause = pause

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        time.sleep(self.pause)
        return torch.randn(1, 40 + 7 * (i % 5), generator=torch.Generator().manual_seed(i))


def padded(rows):
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv1d(4, 6, 5, stride=2))


def run(path, pause=0.0, length=120, **options):
    options = {"batch_size": 3, "collate_fn": padded, "shard_bytes": 6000, "progress": False, **options}
    return extract(model(), Ragged(length, pause), path, **options)


def kill_repeatedly(folder: Path, kills: int) -> None:
    """Forks runs and kills them at random moments; a run that ends by itself is followed by one into a new directory."""
    draw = random.Random(0)
    stores, killed = 0, 0
    while killed < kills:
        child = os.fork()
        if not child:
            run(folder / str(stores), pause=0.001, length=1200)
            os._exit(0)
        time.sleep(draw.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            assert os.WEXITSTATUS(status) == 0
            stores += 1
    print(f"{killed} kills, {stores + 1} stores")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill_repeatedly(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        if len(sys.argv) > 5:
            multiprocessing.set_start_method(sys.argv[5])
        print("begins", flush=True)
        run(sys.argv[2], pause=float(sys.argv[3]), num_workers=int(sys.argv[4]))
        print("done", flush=True)
