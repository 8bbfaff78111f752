"""Writes a data set's outputs to disk with each library, and reads a sample back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH = 1000, 32
#: Returns a layer's output for a sample, by its number, with a batch axis.
Read = Callable[[str, int], Tensor]


def convtap(model: nn.Module, names: Sequence[str], data: Tensor, folder: Path, **options: str) -> Read:
    from convtap import extract

    whole = TensorDataset(data)
    store = extract(model, whole, folder / "store", list(names), batch_size=BATCH, progress=False, **options)  # type: ignore[arg-type]
    return lambda name, sample: store[name][sample].unsqueeze(0)


def raw_hooks(model: nn.Module, names: Sequence[str], data: Tensor, folder: Path) -> Read:
    """Collects outputs in lists, and saves them at the end."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, output, name=name: kept[name].append(output.clone())
        )
    for batch in data.split(BATCH):
        model(batch)
    torch.save({name: torch.cat(outputs) for name, outputs in kept.items()}, folder / "all.pt")
    return lambda name, sample: torch.load(folder / "all.pt", mmap=True)[name][sample : sample + 1]


def torchlens(model: nn.Module, names: Sequence[str], data: Tensor, folder: Path) -> Read:
    import torchlens as library

    library.extract_dataset(
        model, data, library.func("conv1d"), batch_size=BATCH, output_dir=folder / "out", progress=False
    )

    def read(name: str, sample: int) -> Tensor:
        found = library.load_extraction(folder / "out").activations
        return found[list(found)[list(names).index(name)]][sample : sample + 1]

    return read


def captum(model: nn.Module, names: Sequence[str], data: Tensor, folder: Path) -> Read:
    from captum._utils.av import AV

    AV.generate_dataset_activations(
        str(folder), model, "model", list(names), DataLoader(TensorDataset(data), batch_size=BATCH)
    )

    def read(name: str, sample: int) -> Tensor:
        batches = AV.load(str(folder), "model", layer=name)
        return batches[sample // BATCH][sample % BATCH].unsqueeze(0)

    return read


EXTRACT: dict[str, Callable[[nn.Module, Sequence[str], Tensor, Path], Read]] = {
    "convtap": convtap,
    "convtap, shard_bytes='256MB'": functools.partial(convtap, shard_bytes="256MB"),
    "raw hooks": raw_hooks,
    "torchlens": torchlens,
    "captum": captum,
}
