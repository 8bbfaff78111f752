"""Ranks that do not go together: split data, samplers that know the ranks, gaps by rank, and other numbers of ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from convtap._dataset.extract import extract
from convtap._dataset.store import Store
from convtap._errors import StoreError
from convtap.cli import main
from tests.killed_run import Ragged, model, padded, run
from tests.process import SRC
from tests.reference import same
from tests.test_extract_crash import assert_whole, expected, same_stores

# -- torchrun

SCRIPT = """
import os, sys, signal
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from convtap._dataset.extract import extract
from tests.killed_run import Ragged, model, padded
torch.set_num_threads(1)
path, die = sys.argv[1], sys.argv[2]
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", f"file://{path}.meeting{size}", rank=rank, world_size=size)
if die == "die" and rank == 2:
    import convtap._dataset.shard_publisher as writer
    write, count = writer.write_shard, iter(range(100))
    def killed(*args):
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)
    writer.write_shard = killed
data = Ragged(121, 0.002)
loader = DataLoader(data, batch_size=3, sampler=DistributedSampler(data), collate_fn=padded)
extract(model(), loader, path, shard_bytes=6000, progress=False)
dist.destroy_process_group()
"""


def torchrun(processes, path, *args):
    script = path.parent / "script.py"
    script.write_text(SCRIPT)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), str(path), *args),
    ]
    env = {**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{SRC.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_three_ranks_of_which_one_dies_for_good_are_gone_on_with_by_two_bit_for_bit(tmp_path):
    path = tmp_path / "s"
    assert torchrun(3, path, "die").returncode != 0
    store = Store(path)
    assert any(number % 3 == 2 for number in store.missing)
    assert "rank 2 (" in repr(store).partition("of 3 ranks ")[2]
    done = torchrun(2, path, "live")
    assert done.returncode == 0, done.stderr
    store = Store(path)
    assert store.ids == list(range(121))
    assert all(same(store.sample(i), by_hand) for i, by_hand in expected(120).items())
    assert same_stores(store, run(tmp_path / "one", length=121))
    assert len(store._reader.index.duplicates) == 0


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_distributed_sampler_is_replaced_by_whole_batches_without_doubles(shuffle, tmp_path):
    data = Ragged(11)
    for i in range(3):
        sampler = DistributedSampler(data, num_replicas=3, rank=i, shuffle=shuffle)  # gives 4 each, one of them twice
        loader = DataLoader(data, batch_size=3, sampler=sampler, collate_fn=padded)
        store = extract(model(), loader, tmp_path / "parts", part=(i, 3), progress=False)
    assert store.ids == list(range(11))
    assert same_stores(store, run(tmp_path / "one", length=11))


# -- data that is split already


def numbered(count=9):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 1, 50, generator=draw), [f"{i}-0", f"{i}-1"]) for i in range(count)]


def test_an_iterable_that_is_split_among_the_ranks_already_is_refused_and_names_rank_and_samples(tmp_path):
    options = {"ids": lambda batch: batch[1], "progress": False}
    extract(model(), iter(numbered()[0::2]), tmp_path, part=(0, 2), **options)
    message = (
        r"^rank 1 of 2: the data begins with the samples '1-0', '1-1', but the process that began this store read "
        r"'0-0', '0-1' first\. Pass every process the whole iterable"
    )
    with pytest.raises(StoreError, match=message):
        extract(model(), iter(numbered()[1::2]), tmp_path, part=(1, 2), **options)
    assert not list(tmp_path.glob("rank-00001/shard-*"))
    store = extract(model(), iter(numbered()[0::2]), tmp_path, part=(1, 2), **options)
    assert store.missing == []
    assert len(store) == 10


def test_ranks_with_other_data_that_begin_at_once_do_not_both_write(tmp_path):
    options = {"ids": lambda batch: batch[1], "progress": False}

    def slowly():
        yield numbered()[0]
        extract(model(), iter(numbered()[1::2]), tmp_path, part=(1, 2), **options)  # begins and ends meanwhile

    with pytest.raises(StoreError, match=r"^rank 0 of 2: the data begins with the samples '0-0', '0-1'"):
        extract(model(), slowly(), tmp_path, part=(0, 2), **options)
    assert all(id.startswith(("3", "7")) for id in Store(tmp_path).ids)


def test_a_run_that_failed_before_it_wrote_does_not_say_how_the_data_begins(tmp_path):
    def fails():
        yield numbered()[3]
        raise OSError("gone")

    options = {"ids": lambda batch: batch[1], "progress": False, "part": (1, 2)}
    with pytest.raises(OSError, match="gone"):
        extract(model(), fails(), tmp_path, **options)
    extract(model(), iter(numbered()), tmp_path, **options)


def test_ids_that_two_ranks_gave_are_named(tmp_path):
    data = numbered(4)
    data[3] = (data[3][0], ["3-0", "0-1"])
    options = {"ids": lambda batch: batch[1], "progress": False}

    def slowly():
        yield data[0]
        extract(model(), data, tmp_path, part=(1, 2), **options)  # at the same time, so neither sees the other's ids
        yield from data[1:]

    data_of_length = type("Slowly", (list,), {"__iter__": lambda self: slowly()})(data)
    extract(model(), data_of_length, tmp_path, part=(0, 2), **options)
    store = Store(tmp_path)
    assert "1 id of several samples each: '0-1'" in repr(store)
    with pytest.raises(StoreError, match="several samples have the id '0-1'"):
        store.position("0-1")


# -- what info says


def test_info_shows_ranks_gaps_and_doubles(tmp_path, capsys):
    for i in (0, 2, 3):
        run(tmp_path / "s", part=(i, 5))
    assert main(["info", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "written by 3 ranks, 8 batches each" in said
    assert "2 of 5 ranks are not done: rank 1 (8 batches, nothing written), rank 4 (8 batches, nothing written)" in said
    (tmp_path / "s" / "rank-00003" / "shard-000001.safetensors").unlink()
    assert main(["info", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(
        "3 of 5 ranks are not done: rank 1 (8 batches, nothing written), rank 3 (2 batches), rank 4 (8" in line
        for line in said
    )


def test_after_a_resume_with_fewer_ranks_the_gaps_are_those_of_the_new_ranks(tmp_path):
    run(tmp_path, part=(1, 5))
    run(tmp_path, part=(0, 2))
    store = Store(tmp_path)
    assert store.missing == [number for number in range(40) if number % 2 and number % 5 != 1]
    assert "1 of 2 ranks is not done: rank 1 (16 batches)" in repr(store)
    assert_whole(run(tmp_path))
    assert "not done" not in repr(Store(tmp_path))


def test_one_process_says_nothing_of_ranks(tmp_path):
    assert "rank" not in repr(run(tmp_path, length=6))
    assert not (tmp_path / "rank-00000" / "part.json").exists()


def test_two_ranks_with_the_same_part_are_refused_by_the_lock_of_its_folder(tmp_path):
    class Slow(TensorDataset):
        def __getitem__(self, i):
            run(tmp_path, part=(1, 2))
            return super().__getitem__(i)

    with pytest.raises(
        StoreError, match=r"is extracting into '.*rank-00001', and only one process at a time can write .*part="
    ):
        extract(model(), Slow(torch.randn(4, 1, 50)), tmp_path, part=(1, 2), progress=False)
