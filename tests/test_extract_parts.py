"""Many processes on one store: torchrun, job arrays, ranks that die, and what is read back from all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convtap._dataset.extract import extract
from convtap._dataset.shard_reader import Shard
from convtap._dataset.store import Store
from convtap._errors import StoreError
from tests.killed_run import Ragged, model, padded, run
from tests.process import SRC
from tests.test_extract_crash import assert_whole, same_stores

ROOT = Path(__file__).parent.parent


def shards(path):
    return sorted(str(file.relative_to(path)) for file in path.glob("rank-*/shard-*"))


# -- job arrays


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_together_are_the_whole_bit_for_bit(parts, tmp_path):
    for i in reversed(range(parts)):
        store = run(tmp_path / "parts", part=(i, parts))
    assert_whole(store)
    assert len(list((tmp_path / "parts").glob("rank-*"))) == parts
    assert len(store._reader.index.duplicates) == 0
    assert same_stores(store, run(tmp_path / "one"))
    assert f"written by {parts} ranks" in repr(store)


def test_a_missing_part_is_a_gap_that_is_named_and_any_number_of_parts_fills_it(tmp_path):
    run(tmp_path, part=(0, 3))
    run(tmp_path, part=(2, 3))
    store = Store(tmp_path)
    assert store.missing == list(range(1, 40, 3))
    assert "incomplete: 13 of 40 batches missing (1, 4, 7, 10, 13, 16, …)" in repr(store)
    with pytest.raises(IndexError, match=r"no sample has the id 3\..*The extraction is incomplete"):
        store["0"][3]
    before = shards(tmp_path)
    assert_whole(run(tmp_path))
    assert len(store._reader.index.duplicates) == 0
    assert set(before) < set(shards(tmp_path))


def test_a_part_that_has_no_batches_waits_for_nobody(tmp_path):
    store = run(tmp_path, length=6, part=(4, 5))
    assert len(store) == 0
    assert store.missing == [0, 1]


def test_batches_that_are_there_twice_are_read_once_and_named(tmp_path):
    run(tmp_path)
    shutil.copytree(tmp_path / "rank-00000", tmp_path / "rank-00001")
    store = Store(tmp_path)
    assert_whole(store)
    assert "40 batches stored twice: the later copies, in rank-00001/shard-000000.safetensors" in repr(store)


def test_another_model_or_option_on_one_rank_is_refused_and_names_the_rank(tmp_path):
    run(tmp_path, part=(0, 2))
    with pytest.raises(StoreError, match=r"^rank 1 of 2: .* was begun with other arguments: dtype: None then"):
        run(tmp_path, part=(1, 2), dtype=torch.float16)
    assert not (tmp_path / "rank-00001").exists()


def test_a_rank_that_writes_first_wins_when_two_begin_at_once_with_different_options(tmp_path):
    class Slow(Ragged):
        """While its first sample is read, another rank begins and ends."""

        def __getitem__(self, i):
            if i == 0:
                run(tmp_path, part=(1, 2))
            return super().__getitem__(i)

    options = {"batch_size": 3, "collate_fn": padded, "progress": False}
    with pytest.raises(StoreError, match=r"^rank 0 of 2: .*begun with other arguments: at: 'output' then, 'input' now"):
        extract(model(), Slow(), tmp_path, part=(0, 2), at="input", **options)
    assert Store(tmp_path).missing == list(range(0, 40, 2))


def test_parts_of_an_iterable_go_by_ids(tmp_path):
    batches = torch.randn(9, 1, 50).split(2)
    numbered = [(batch, [10 * i, 10 * i + 1][: len(batch)]) for i, batch in enumerate(batches)]
    net = model()
    for i in range(2):
        store = extract(net, numbered, tmp_path, ids=lambda batch: batch[1], part=(i, 2), progress=False)
    assert store.ids == [0, 1, 10, 11, 20, 21, 30, 31, 40]
    assert store.missing == []
    with torch.inference_mode():
        assert torch.equal(store["0"][21], net[0](batches[2])[1])


# -- torchrun


SCRIPT = """
import os, sys, signal
import torch
import torch.distributed as dist
from tests.killed_run import run
torch.set_num_threads(1)
meeting = "file://{}.meeting{}".format(sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gloo", meeting, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
path, die = sys.argv[1], sys.argv[2]
if dist.get_rank() == 1 and die == "die" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import convtap._dataset.shard_publisher as writer
    write, count = writer.write_shard, iter(range(100))
    def killed(*args):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)
    writer.write_shard = killed
store = run(path, pause=0.002)
print(f"rank {dist.get_rank()} had {len(store)}")
dist.destroy_process_group()
"""


def torchrun(processes, path, *args, restarts=0):
    script = path.parent / "script.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), str(path), *args),
    ]
    env = {**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_three_torchrun_processes_share_forty_batches_and_give_what_one_process_gives(tmp_path):
    done = torchrun(3, tmp_path / "s", "live")
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "s")
    assert_whole(store)
    assert len(list((tmp_path / "s").glob("rank-*"))) == 3
    assert len(store._reader.index.duplicates) == 0
    per_rank = [len(batches_of(tmp_path / "s", rank)) for rank in range(3)]
    assert per_rank == [14, 13, 13]


def batches_of(path, rank):
    return [number for file in (path / f"rank-{rank:05d}").glob("shard-*") for number, _ in Shard(file).batches]


def test_one_of_two_torchrun_processes_that_is_killed_and_restarted_leaves_no_gap(tmp_path):
    done = torchrun(2, tmp_path / "s", "die", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert_whole(Store(tmp_path / "s"))
    assert len(list((tmp_path / "s").glob("rank-*"))) == 2


# -- the index


def test_the_index_follows_shards_that_are_newer_or_gone(tmp_path, monkeypatch):
    import convtap._dataset.index as index

    run(tmp_path)
    opened = []
    original = index.Shard

    def counted(path):
        opened.append(os.path.basename(path))
        return original(path)

    monkeypatch.setattr(index, "Shard", counted)
    store = Store(tmp_path)
    assert len(opened) == len(set(opened)) == 20  # each once
    assert_whole(store)
    (tmp_path / "rank-00000" / "shard-000002.safetensors").unlink()
    assert Store(tmp_path).missing == [4, 5]
    opened.clear()
    run(tmp_path)
    opened.clear()
    assert len(Store(tmp_path)) == 120
    assert opened[-1] == "shard-000020.safetensors"
    (tmp_path / ".index.npz").write_bytes(b"saved by an earlier version")
    assert_whole(Store(tmp_path))
