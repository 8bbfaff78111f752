"""Data that are given again: the same go on, others are refused with what differs, whatever kind they are of."""

from __future__ import annotations

import dataclasses
import json
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import convtap._dataset.job as job_module
from convtap._dataset.extract import extract as extract_with_bar
from convtap._dataset.store import Store
from convtap._errors import StoreError

A = torch.randn(20, 1, 30, generator=torch.Generator().manual_seed(1))
B = torch.randn(20, 1, 30, generator=torch.Generator().manual_seed(2))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3))


def extract(data, path, net=None, **options):
    return extract_with_bar(net or model(), data, path, **{"progress": False, "shard_bytes": 1, **options})


class Counted(Dataset):
    """Counts what is read."""

    def __init__(self, rows):
        self.rows = rows
        self.read = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.read.append(i)
        return self.rows[i]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


KINDS = {
    "data set": (lambda rows: TensorDataset(rows), {"batch_size": 4}),
    "loader": (lambda rows: DataLoader(TensorDataset(rows), batch_size=4), {}),
    "shuffled loader": (lambda rows: DataLoader(TensorDataset(rows), batch_size=4, shuffle=True), {}),
    "loader with workers": (lambda rows: DataLoader(TensorDataset(rows), batch_size=4, num_workers=1), {}),
    "batch sampler": (lambda rows: DataLoader(TensorDataset(rows), batch_sampler=[[3, 1], [0, 2], [7]]), {}),
    "list": (lambda rows: list(rows.split(4)), {}),
    "tuples": (lambda rows: [(batch, i) for i, batch in enumerate(rows.split(4))], {}),
    "dicts": (
        lambda rows: [{"audio": batch.numpy()} for batch in rows.split(4)],
        {"inputs": lambda batch: ((torch.from_numpy(batch["audio"]),), {})},
    ),
    "generator": (lambda rows: (batch for batch in rows.split(4)), {}),
    "stream": (lambda rows: DataLoader(Stream(rows), batch_size=4), {}),
    "ids": (
        lambda rows: [(batch, [f"{i}-{k}" for k in range(4)]) for i, batch in enumerate(rows.split(4))],
        {"ids": lambda batch: batch[1]},
    ),
}


def lose(path, number=2):
    """Loses a batch, so that the store is not finished."""
    (path / "rank-00000" / f"shard-{number:06d}.safetensors").unlink()


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize(("make", "options"), KINDS.values(), ids=KINDS)
def test_other_data_of_equal_length_are_refused_and_the_same_data_go_on(make, options, finished, tmp_path):
    whole = extract(make(A), tmp_path, **options)
    expected = [whole.sample(id) for id in whole.ids]
    if not finished:
        lose(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    with pytest.raises(StoreError, match=r"was begun with other data.*The inputs of batch 0 differ in their values"):
        extract(make(B), tmp_path, **options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")} == before
    store = extract(make(A), tmp_path, **options)
    assert store.missing == []
    assert all(torch.equal(store.sample(id)["0"], row["0"]) for id, row in zip(store.ids, expected, strict=True))


def test_shapes_that_differ_are_named(tmp_path):
    extract(TensorDataset(A), tmp_path, batch_size=4)
    with pytest.raises(StoreError, match=r"batch 0 differ: float32 \(4, 1, 30\) then, float64 \(4, 1, 20\) now\. Pass"):
        extract(TensorDataset(A[..., :20].double()), tmp_path, batch_size=4)


@pytest.mark.parametrize(("first", "number"), [(4, 2), (12, 4)], ids=["middle", "last"])
def test_data_that_differ_from_a_later_batch_on_are_refused_by_the_middle_or_the_last(first, number, tmp_path):
    mixed = torch.cat([A[:first], B[first:]])
    extract(TensorDataset(A), tmp_path / "set", batch_size=4)
    with pytest.raises(StoreError, match=f"The inputs of batch {number} differ"):
        extract(TensorDataset(mixed), tmp_path / "set", batch_size=4)
    extract(list(A.split(4)), tmp_path / "list")
    with pytest.raises(StoreError, match=f"The inputs of batch {number} differ"):
        extract(list(mixed.split(4)), tmp_path / "list")
    extract((batch for batch in A.split(4)), tmp_path / "generator")
    lose(tmp_path / "generator", 1)
    (tmp_path / "generator" / "rank-00000" / "finished.json").unlink()
    stored = Store(tmp_path / "generator").ids
    with pytest.raises(StoreError, match=r"The inputs of batch [34] differ"):
        extract((batch for batch in mixed.split(4)), tmp_path / "generator")
    assert set(stored) <= set(Store(tmp_path / "generator").ids)


def test_another_order_is_refused(tmp_path):
    extract(list(A.split(4)), tmp_path)
    with pytest.raises(StoreError, match="inputs of batch 0 differ"):
        extract(list(A.split(4))[::-1], tmp_path)


@pytest.mark.parametrize("part", ["labels", "lengths"])
def test_other_labels_or_lengths_of_the_same_sounds_are_refused(part, tmp_path):
    first = [(batch, torch.full((4,), 20)) for batch in A.split(4)]
    other = [(batch, torch.full((4,), 21)) for batch in A.split(4)]
    options = {part: lambda batch: batch[1]}
    extract(first, tmp_path, **options)
    with pytest.raises(StoreError, match=f"The {part} of batch 0 differ in their values"):
        extract(other, tmp_path, **options)
    assert extract(first, tmp_path, **options).missing == []


def test_what_the_model_is_called_with_is_compared_not_what_it_is_taken_from(tmp_path):
    stereo = TensorDataset(torch.cat([A, B], 1))
    left = {"inputs": lambda batch: ((batch[0][:, :1],), {})}
    extract(stereo, tmp_path, batch_size=4, **left)
    with pytest.raises(StoreError, match="The inputs of batch 0 differ in their values"):
        extract(stereo, tmp_path, batch_size=4, inputs=lambda batch: ((batch[0][:, 1:],), {}))
    assert len(extract(TensorDataset(A), tmp_path, batch_size=4, **left)) == 20


@dataclasses.dataclass
class Item:
    x: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: ((x,), {}),
        lambda x: ((), {"x": x}),
        lambda x: ((Item(x),), {}),
        lambda x: ((UserDict(x=x),), {}),
        lambda x: (([x.numpy()],), {}),
        lambda x: ((x.half(),), {}),
        lambda x: ((torch.complex(x, x),), {}),
        lambda x: (({"nested": (None, {"x": x})},), {}),
        lambda x: ((x.tolist(),), {}),
    ],
    ids=["tensor", "keyword", "dataclass", "mapping", "array", "half", "complex", "nested", "plain numbers"],
)
def test_values_are_compared_wherever_they_lie_in_the_arguments(wrap, tmp_path):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            return self.conv(torch.zeros(4, 1, 3))

    torch.manual_seed(0)
    net = Takes()
    options = {"inputs": wrap, "ids": lambda batch: range(4)}
    extract([A[:4]], tmp_path, net, **options)
    extract([A[:4]], tmp_path, net, **options)
    changed = A[:4].clone()
    changed[2, 0, 17] += 1
    with pytest.raises(StoreError, match="The inputs of batch 0 differ"):
        extract([changed], tmp_path, net, **options)


def test_a_resume_reads_four_batches_at_most_of_what_is_there(tmp_path):
    data = Counted(A)
    extract(data, tmp_path, batch_size=2)
    assert data.read == list(range(20)), "a first run reads every sample once"
    data.read.clear()
    extract(data, tmp_path, batch_size=2)
    assert data.read == [0, 1, 10, 11, 18, 19]
    lose(tmp_path, 3)
    data.read.clear()
    assert extract(data, tmp_path, batch_size=2).missing == []
    assert sorted(data.read) == [0, 1, 6, 7, 10, 11, 18, 19]


def test_a_generator_loses_nothing_by_the_comparison(tmp_path):
    def batches(seen):
        for number, batch in enumerate(A.split(4)):
            seen.append(number)
            yield batch

    first, second, third = [], [], []
    extract(batches(first), tmp_path)
    lose(tmp_path)
    store = extract(batches(second), tmp_path)
    assert second == [0, 1, 2, 3, 4]
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(store.numpy("0")), torch.cat([model()(batch) for batch in A.split(4)]))
    generator = batches(third)
    extract(generator, tmp_path)
    assert third == [0], "nothing is missing, so the first batch is enough"
    with pytest.raises(Exception, match="the data has length 0"):  # and not a data set that begins with batch 1
        extract(generator, tmp_path / "other")


class Augmented(Counted):
    def __getitem__(self, i):
        return super().__getitem__(i) + torch.randn(1, 30)


def test_random_augmentation_is_not_taken_for_other_data(tmp_path):
    extract(Augmented(A), tmp_path, batch_size=4)
    lose(tmp_path)
    torch.manual_seed(5)
    assert extract(Augmented(A), tmp_path, batch_size=4).missing == []
    for i in range(2):
        extract(Augmented(A), tmp_path / "parts", batch_size=4, part=(i, 2))
    assert Store(tmp_path / "parts").missing == []


class Unreadable(Counted):
    bad = ()

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"sample {i} is gone")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_are_stored_and_gone_since_do_not_stop_a_resume(workers, tmp_path):
    data = Unreadable(A)
    extract(data, tmp_path, batch_size=4)
    lose(tmp_path)
    data.bad = (0, 19)
    assert extract(data, tmp_path, batch_size=4, num_workers=workers).missing == []
    data.bad = (9,)
    lose(tmp_path, 5)  # which holds the batch that was computed again
    with pytest.raises(OSError, match="sample 9 is gone"):
        extract(data, tmp_path, batch_size=4, num_workers=workers)


def test_a_rank_with_other_data_is_refused_before_it_writes(tmp_path):
    extract(TensorDataset(A), tmp_path, batch_size=4, part=(0, 2))
    with pytest.raises(StoreError, match=r"^rank 1 of 2: .* was begun with other data"):
        extract(TensorDataset(B), tmp_path, batch_size=4, part=(1, 2))
    assert not list(tmp_path.glob("rank-00001/shard-*"))
    assert extract(TensorDataset(A), tmp_path, batch_size=4, part=(1, 2)).missing == []


def test_ranks_with_other_data_that_begin_at_once_do_not_both_write(tmp_path):
    class Slow(Counted):
        def __getitem__(self, i):
            if not self.read:
                self.read.append(i)
                extract(TensorDataset(B), tmp_path, batch_size=4, part=(1, 2))  # begins and ends meanwhile
            return super().__getitem__(i)

    with pytest.raises(StoreError, match=r"^rank 0 of 2: .* was begun with other data"):
        extract(Slow(A), tmp_path, batch_size=4, part=(0, 2))
    assert not list(tmp_path.glob("rank-00000/shard-*"))


def test_a_store_of_an_earlier_version_opens_and_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        batch = job_module.Batch
        patch.setattr(job_module, "Batch", lambda *args: batch(*args[:4]))
        extract(TensorDataset(A), tmp_path, batch_size=4)
    (tmp_path / ".beginning.json").unlink()
    description = json.loads((tmp_path / "store.json").read_text())
    del description["identity"]["stop"]
    (tmp_path / "store.json").write_text(json.dumps(description))
    lose(tmp_path)
    assert Store(tmp_path).missing == [2]
    assert extract(TensorDataset(A), tmp_path, batch_size=4).missing == []
    assert np.isfinite(Store(tmp_path).numpy("0")).all()
    lose(tmp_path, 3)
    with pytest.raises(StoreError, match="The inputs of batch 2 differ"):  # the one that this version wrote
        extract(TensorDataset(B), tmp_path, batch_size=4)


def test_batches_that_a_model_changes_in_place_are_compared_as_they_came(tmp_path):
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            return self.conv(x.mul_(2))

    torch.manual_seed(0)
    net = Doubles()
    extract([A[:4].clone(), A[4:8].clone()], tmp_path, net)
    assert len(extract([A[:4].clone(), A[4:8].clone()], tmp_path, net)) == 8
