"""What survives: kills, signals, a full disk, damaged shards, models and loaders that fail; and what a resume refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from convtap._dataset.extract import extract
from convtap._dataset.store import Store
from convtap._errors import ConvtapError, CoverageWarning, StoreError
from tests.killed_run import Ragged, model, padded, run
from tests.process import SRC
from tests.reference import cloning_hooks, same

ROOT = Path(__file__).parent.parent


@cache
def expected(length=120):
    """Every sample's outputs, by hand: batches of three in order, each through the model, cloned by plain hooks."""
    net, data, found = model().eval(), Ragged(length), {}
    for start in range(0, length, 3):
        with cloning_hooks(net) as seen, torch.inference_mode():
            net(padded([data[i] for i in range(start, start + 3)]))
        for row in range(3):
            found[start + row] = {name: output[row] for name, output in seen}
    return found


def assert_whole(store, length=120):
    assert store.ids == list(range(length))
    assert store.missing == []
    assert not store.verify()
    reference = expected(length)
    for i in range(length):
        assert same(store.sample(i), reference[i])


def start(*args):
    env = {**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "tests" / "killed_run.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_shards(path, count, process):
    deadline = time.monotonic() + 60
    while len(list(path.glob("rank-*/shard-*.safetensors"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same_stores(a, b):
    return a.ids == b.ids and all(same(a.sample(i), b.sample(i)) for i in a.ids)


# -- killed


def test_fifty_kills_at_random_moments_and_a_resume_give_what_an_uninterrupted_run_gives(tmp_path):
    process = start("kill", tmp_path, 50)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("50 kills")
    stores = sorted(tmp_path.iterdir())
    for path in stores:
        run(path, length=1200)
    whole = run(tmp_path / "uninterrupted", length=1200)
    for path in stores:
        store = Store(path)
        assert_whole(store, 1200)
        assert same_stores(store, whole)
        assert not list(path.glob("rank-*/.*.part")), "what a killed process left half-written is gone"


def test_a_directory_that_is_locked_is_refused_and_names_the_process(tmp_path):
    process = start("run", tmp_path, 0.05, 0)
    try:
        wait_for_shards(tmp_path, 1, process)
        with pytest.raises(StoreError, match=rf"process {process.pid} on .* is extracting into .*rank-00000.*part="):
            run(tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert_whole(run(tmp_path))


def test_a_killed_parent_leaves_no_lock_with_its_loader_workers(tmp_path):
    process = start("run", tmp_path, 0.05, 1)
    wait_for_shards(tmp_path, 1, process)
    process.kill()  # its forked worker lives on for some seconds
    process.wait()
    assert_whole(run(tmp_path))
    process.communicate()


def test_a_killed_parent_takes_its_fork_server_and_loader_workers_with_it(tmp_path):
    process = start("run", tmp_path, 0.05, 1, "forkserver")
    wait_for_shards(tmp_path, 1, process)
    process.kill()
    process.communicate(timeout=60)  # its pipes are open until the last of them has ended


def test_a_loaders_own_worker_init_fn_is_called(tmp_path):
    noted = tmp_path / "noted"
    loader = DataLoader(
        Ragged(9), batch_size=3, collate_fn=padded, num_workers=1, worker_init_fn=partial(note_worker, noted)
    )
    extract(model(), loader, tmp_path / "store", progress=False)
    assert noted.read_text() == "worker 0"


def note_worker(file, worker):
    file.write_text(f"worker {worker}")


def test_one_process_cannot_extract_into_one_directory_twice_at_once(tmp_path):
    data = Ragged()
    data.__class__ = type("Nested", (Ragged,), {"__getitem__": lambda self, i: run(tmp_path)[0]})
    with pytest.raises(StoreError, match=r"this process \(\d+\) is extracting"):
        extract(model(), data, tmp_path, batch_size=3, collate_fn=padded, progress=False)


def test_sigterm_writes_what_was_computed_and_ends_the_process_by_that_signal(tmp_path):
    process = start("run", tmp_path, 0.02, 0)
    wait_for_shards(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, err
    assert "done" not in out
    store = Store(tmp_path)
    assert 0 < len(store) < 120
    assert not store.verify()
    assert_whole(run(tmp_path))


def test_a_sigterm_handler_of_the_user_is_called_and_put_back(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail("on Windows, os.kill ends the process"))
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args))
    handler = signal.getsignal(signal.SIGTERM)

    class Signals(Ragged):
        def __getitem__(self, i):
            if i == 30:
                signal.raise_signal(signal.SIGTERM)
            return super().__getitem__(i)

    try:
        with pytest.raises(StoreError, match="SIGTERM ended the extraction"):
            extract(model(), Signals(), tmp_path, batch_size=3, collate_fn=padded, progress=False)
        assert len(seen) == 1
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Store(tmp_path).ids == list(range(30))


# -- failures inside


class Raises(nn.Module):
    """Raises on a call of which the number is given."""

    def __init__(self, on, error):
        super().__init__()
        self.inner = model()
        self.calls = 0
        self.on = on
        self.error = error

    def forward(self, x):
        self.calls += 1
        if self.calls == self.on:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("error", [RuntimeError("batch 37"), KeyboardInterrupt()], ids=["raises", "ctrl-c"])
def test_a_model_that_fails_on_batch_37_keeps_the_36_before_it(error, tmp_path):
    options = {"batch_size": 3, "collate_fn": padded, "progress": False}
    with pytest.raises(type(error)):
        extract(Raises(37, error), Ragged(), tmp_path, **options)
    half = Store(tmp_path)
    assert half.ids == list(range(108))
    assert half.missing == [36, 37, 38, 39]
    assert "incomplete: 4 of 40 batches missing (36–39)" in repr(half)
    store = extract(Raises(0, error), Ragged(), tmp_path, **options)
    assert store.missing == []
    reference = expected()
    assert all(same(store["inner.0"][i], reference[i]["0"]) for i in range(120))


class DiesAt(Ragged):
    """A data set whose loader worker is killed when it reads a sample."""

    def __init__(self, at, parent):
        super().__init__()
        self.at = at
        self.parent = parent

    def __getitem__(self, i):
        if i == self.at and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_loader_worker_that_dies_loses_no_batch_that_was_computed(tmp_path):
    data = DiesAt(60, os.getpid())
    loader = DataLoader(data, batch_size=3, collate_fn=padded, num_workers=1, prefetch_factor=1)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        extract(model(), loader, tmp_path, progress=False)
    assert 0 < len(Store(tmp_path)) <= 60
    loader = DataLoader(Ragged(), batch_size=3, collate_fn=padded)
    assert_whole(extract(model(), loader, tmp_path, progress=False))


def test_a_full_disk_is_said_leaves_no_half_file_and_the_next_run_goes_on(tmp_path, monkeypatch):
    import convtap._dataset.shard_publisher as writer

    write, count = writer.write_shard, iter(range(100))

    def full(path, batches):
        if next(count) == 3:
            path.write_bytes(b"the half that still found room")
            raise OSError(28, "No space left on device")
        return write(path, batches)

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(StoreError, match=r"the disk is full .*Make room .*again to resume"):
        run(tmp_path)
    assert not list(tmp_path.glob("rank-*/.*.part"))
    assert len(Store(tmp_path)) > 0
    monkeypatch.undo()
    assert_whole(run(tmp_path))


def test_what_is_computed_while_a_shard_is_written_is_bounded(tmp_path, monkeypatch):
    """The writer is slow: the loop waits for it, and never has more than two shards' batches in memory."""
    import convtap._dataset.shard_publisher as writer

    write, held, most = writer.write_shard, [], []

    def slow(path, batches):
        time.sleep(0.02)
        size = write(path, batches)
        held.append(len(batches))
        return size

    monkeypatch.setattr(writer, "write_shard", slow)
    original = writer.ShardPublisher.add

    def add(self, batch):
        original(self, batch)
        computed = batch.number + 1
        most.append(computed - sum(held))

    monkeypatch.setattr(writer.ShardPublisher, "add", add)
    run(tmp_path)
    assert max(most) <= 2 * 2 + 1  # two shards of two batches, and the one that is just in


# -- damaged shards


def damage(shard, how):
    content = bytearray(shard.read_bytes())
    if how == "bit":
        content[-5] ^= 1
    elif how == "header":
        content[40] ^= 1
    elif how == "truncated":
        content = content[:-100]
    elif how == "empty":
        content = content[:0]
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("bit", "damaged: the checksum of"),
        ("header", "its header is damaged"),
        ("truncated", r"truncated: it has \d+ bytes instead of \d+"),
        ("empty", "truncated: it has 0 bytes"),
    ],
)
def test_a_damaged_shard_is_found_by_verify_and_computed_again_by_a_resume(how, problem, tmp_path):
    run(tmp_path)
    shard = tmp_path / "rank-00000" / "shard-000003.safetensors"
    damage(shard, how)
    if how == "bit":
        store = Store(tmp_path)
    else:
        with pytest.warns(CoverageWarning, match=r"1 of 20 shards cannot be read.*shard-000003"):
            store = Store(tmp_path)
        assert len(store) == 114
        with pytest.raises(IndexError, match=r"no sample has the id 18\b.*cannot be read"):
            store["0"][18]
    found = store.verify()
    assert [name for name, _ in found] == ["rank-00000/shard-000003.safetensors"]
    import re

    assert re.search(problem, found[0][1])
    with pytest.warns(CoverageWarning, match=r"were renamed to \.bad.*shard-000003"):
        store = run(tmp_path)
    assert_whole(store)
    assert (tmp_path / "rank-00000" / "shard-000003.safetensors.bad").exists()


def test_a_shard_that_is_gone_is_a_gap_that_a_resume_fills(tmp_path):
    run(tmp_path)
    (tmp_path / "rank-00000" / "shard-000005.safetensors").unlink()
    assert Store(tmp_path).missing == [10, 11]
    assert_whole(run(tmp_path))


# -- what a resume refuses


class Other(nn.Sequential):
    """Another class with the same parameters."""


def changed(change):
    net = model()
    change(net)
    return net


def kernel_less(net):
    net[0] = nn.Conv1d(1, 4, 5)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (
            lambda: changed(lambda net: net[2].bias.data.add_(1)),
            {},
            r"1 of 4 parameters and buffers have other values, 2\.bias",
        ),
        (lambda: changed(kernel_less), {}, r"0\.weight is float32 \(4, 1, 3\) then, float32 \(4, 1, 5\) now"),
        (
            lambda: changed(lambda net: setattr(net[2], "stride", (1,))),
            {},
            "its modules have other classes or settings",
        ),
        (lambda: Other(*model()), {}, "the model: Sequential then, Other now"),
        (lambda: nn.Sequential(*model(), nn.Linear(3, 3)), {}, r"only now 3\.bias, 3\.weight"),
        (lambda: model().double(), {}, r"0\.weight is float32 \(4, 1, 3\) then, float64"),
        (model, {"layers": "2"}, "layers: 0, 2 then, 2 now"),
        (model, {"reduce": lambda t: t.mean(-1)}, r"reduce: none then, .*<lambda> now"),
        (model, {"dtype": torch.float16}, "dtype: None then, 'torch.float16' now"),
        (model, {"length": 117}, r"data: length 120.* then, length 117"),
        (model, {"batch_size": 4}, "batch_size 3 then, .*batch_size 4"),
        (model, {"at": "input"}, "at: 'output' then, 'input' now"),
        (model, {"mode": "train"}, "mode: 'eval' then, 'train' now"),
    ],
)
def test_a_resume_with_something_else_is_refused_and_says_what_differs(net, options, message, tmp_path):
    run(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    options = {"length": 120, "batch_size": 3, **options}
    data = Ragged(options.pop("length"))
    with pytest.raises(StoreError, match=message):
        extract(net(), data, tmp_path, collate_fn=padded, progress=False, **options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_reduce_is_compared_by_its_code_and_what_it_closes_over_or_by_reduce_id(tmp_path):
    def power(exponent):
        return lambda t: t.pow(exponent).mean(-1)

    go = partial(extract, model(), Ragged(6), collate_fn=padded, progress=False)
    go(tmp_path / "a", reduce=power(2))
    go(tmp_path / "a", reduce=power(2))
    with pytest.raises(StoreError, match=r"reduce: the code of .*power.* has changed \(with reduce_id="):
        go(tmp_path / "a", reduce=power(3))
    go(tmp_path / "b", reduce=power(2), reduce_id="mean power")
    go(tmp_path / "b", reduce=power(3), reduce_id="mean power")
    with pytest.raises(StoreError, match="reduce: mean then, rms now"):
        go(tmp_path / "b", reduce=power(3), reduce_id="rms")


def test_resume_false_refuses_a_store_that_is_there(tmp_path):
    run(tmp_path, length=6)
    with pytest.raises(StoreError, match=r"is already a store, but resume=False begins a new one"):
        run(tmp_path, length=6, resume=False)


def test_a_second_call_on_a_complete_store_computes_nothing(tmp_path):
    run(tmp_path)
    net = Raises(1, AssertionError("ran"))
    extract(Raises(0, None), Ragged(6), tmp_path / "b", collate_fn=padded, progress=False)
    assert len(extract(net, Ragged(6), tmp_path / "b", collate_fn=padded, progress=False)) == 6


# -- directories


def test_a_directory_that_is_something_else_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(StoreError, match="into=.*file' is a file"):
        run(file)
    with pytest.raises(StoreError, match=r"is not a store, but holds file\."):
        run(tmp_path)
    assert file.read_text() == "mine"
    with pytest.raises(StoreError, match=r"cannot be written: .*/proc"):
        run("/proc/nowhere/store")


def test_what_is_no_whole_store_is_refused_when_it_is_opened(tmp_path):
    with pytest.raises(StoreError, match=r"the directory .*none' does not exist\..*extract\(model, data"):
        Store(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, but a store is a directory"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match=r"is not a store, since it has no store\.json"):
        Store(tmp_path)
    path = tmp_path / "s"
    run(path, length=6)
    description = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**description, "version": 99}))
    with pytest.raises(StoreError, match=r"has format 99, but this convtap reads up to 1\. Update it"):
        Store(path)
    (path / "store.json").write_text(json.dumps({**description, "kind": "zarr"}))
    with pytest.raises(StoreError, match="has the kind 'zarr', so convtap did not write it"):
        Store(path)
    (path / "store.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged, or convtap did not write it"):
        Store(path)
    (path / "store.json").unlink()
    with pytest.raises(
        StoreError, match=r"has rank-00000/shard-000000\.safetensors but no store\.json, so it is incomplete"
    ):
        Store(path)


def test_a_store_can_be_moved(tmp_path):
    run(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert_whole(Store(tmp_path / "b"))


# -- room


def small_disk(monkeypatch, free):
    import convtap._dataset.shard_publisher as publisher

    usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
    monkeypatch.setattr(publisher.shutil, "disk_usage", lambda path: usage)


def test_what_cannot_fit_is_refused_before_the_first_write_with_the_numbers_and_remedies(tmp_path, monkeypatch):
    small_disk(monkeypatch, 100_000)
    data = TensorDataset(torch.zeros(1000, 1, 52))  # 1000 x 4 x 50 x 4 bytes = 781 KiB
    net = nn.Sequential(nn.Conv1d(1, 4, 3))
    with pytest.raises(
        StoreError, match=r"1000 samples of about 800 B take 781\.2 KiB, but .* has 97\.7 KiB free.*reduce="
    ) as e:
        extract(net, data, tmp_path, batch_size=10, shard_bytes=20_000, progress=False)
    assert "nothing was written" in str(e.value)
    assert not list(tmp_path.glob("rank-*/*.safetensors"))
    small_disk(monkeypatch, 1_000_000)
    assert len(extract(net, data, tmp_path, batch_size=10, progress=False)) == 1000


def test_ragged_data_that_may_not_fit_is_a_warning_because_the_rest_may_be_shorter(tmp_path, monkeypatch):
    class Longest(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return torch.zeros(1, 1000 if i == 0 else 12)

    small_disk(monkeypatch, 40_000)
    with pytest.warns(UserWarning, match="may not fit on the disk: 20 samples of about"):
        store = extract(nn.Sequential(nn.Conv1d(1, 2, 3)), Longest(), tmp_path, shard_bytes=8100, progress=False)
    assert len(store) == 20


def test_an_error_that_is_not_ours_is_not_hidden_by_the_flush(tmp_path, monkeypatch):
    import convtap._dataset.shard_publisher as writer

    def broken(path, batches):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "write_shard", broken)
    with pytest.raises(ValueError, match="mine"):
        extract(Raises(2, ValueError("mine")), Ragged(), tmp_path, batch_size=3, collate_fn=padded, progress=False)
    with pytest.raises(ConvtapError, match="cannot be written: .*Input/output error.* Check the disk"):
        run(tmp_path / "b")


def test_a_call_that_failed_before_it_wrote_anything_binds_nobody(tmp_path):
    with pytest.raises(ConvtapError, match="reduce failed"):
        run(tmp_path, reduce=lambda t: t[99])
    with pytest.raises(StoreError, match=r"has no store\.json"):
        Store(tmp_path)
    assert_whole(run(tmp_path))


def test_a_file_system_without_links_works_too(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert_whole(run(tmp_path))
    assert_whole(run(tmp_path))
