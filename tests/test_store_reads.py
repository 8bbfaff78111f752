"""Many rows at once, batches of a data set, maps and calls, and shards that change while a store is open."""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from convtap._dataset import file_system, store_reader
from convtap._dataset.layout import RankFolder, describe
from convtap._dataset.shard_file import CalledFile, MappedFile
from convtap._dataset.shard_format import Batch, write_shard
from convtap._dataset.store import Store
from convtap._dataset.verify import set_bad_aside
from convtap._errors import InvalidType, InvalidValue, NotCaptured, OutOfRange, StoreError
from tests.reference import same

WAYS = {"mapped": {}, "by calls": {"mmap": False}, "not copied": {"copy": False}}


def written(path, shards):
    """A store of these shards; each is a list of batches."""
    layers = list(dict.fromkeys(key for batches in shards for batch in batches for key in batch.columns))
    count = 1 + max(batch.number for batches in shards for batch in batches)
    path.mkdir(exist_ok=True)
    describe(path, {"layers": layers, "calls": "error", "data": {"batches": count}, "given": []})
    (path / "rank-00000").mkdir(exist_ok=True)
    for number, batches in enumerate(shards):
        write_shard(path / "rank-00000" / f"shard-{number:06d}.safetensors", batches)
    return path


def drawn(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def plain(path, rows, ids=None, batch=4, batches=2, key="conv", labels=None):
    """A store of rows of one layer, a few batches a shard."""
    ids = list(range(len(rows))) if ids is None else ids
    made = []
    for number, first in enumerate(range(0, len(rows), batch)):
        some = rows[first : first + batch]
        label = None if labels is None else labels[first : first + batch]
        made.append(Batch(number, ids[first : first + batch], {key: some}, label))
    return written(path, [made[first : first + batches] for first in range(0, len(made), batches)])


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


ROWS = drawn(30, 3, 5)
RAGGED = [drawn(2, 1 + 7 * i % 5, seed=i) for i in range(30)]


# -- many ids


@pytest.mark.parametrize("rows", [ROWS, RAGGED], ids=["alike", "ragged"])
@pytest.mark.parametrize(
    "make",
    [list, np.array, lambda ids: np.array(ids, np.uint64), lambda ids: np.array(ids, np.int8), torch.tensor],
    ids=["list", "array", "uint64", "int8", "tensor"],
)
def test_many_ids_give_their_rows_in_their_order_repeated_ones_too(tmp_path, rows, make, way):
    view = Store(plain(tmp_path, rows), **way)["conv"]
    ids = [29, 0, 7, 7, 13, 1, 12, 29]
    found = view[make(ids)]
    assert len(found) == len(ids)
    assert all(same(row, rows[id]) for row, id in zip(found, ids, strict=True))


def test_ranges_slices_and_masks_give_rows_in_order(tmp_path, way):
    view = Store(plain(tmp_path, ROWS), **way)["conv"]
    assert torch.equal(torch.stack(view[range(20, 3, -4)]), ROWS[[20, 16, 12, 8, 4]])
    assert torch.equal(torch.stack(view[25:2:-3]), ROWS[[25, 22, 19, 16, 13, 10, 7, 4]])
    mask = np.arange(30) % 7 == 2
    for given_mask in (mask, torch.from_numpy(mask), mask.tolist()):
        assert torch.equal(torch.stack(view[given_mask]), ROWS[2::7])
    for nothing in ([], np.array([]), np.array([], np.int64), torch.tensor([]), range(0), slice(5, 5), ~mask & mask):
        assert view[nothing] == []


def test_ids_of_any_order_and_of_text_are_found(tmp_path):
    scattered = [7 * i % 31 - 12 for i in range(30)]
    view = Store(plain(tmp_path, ROWS, scattered))["conv"]
    chosen = [scattered[i] for i in (4, 29, 4, 0)]
    assert torch.equal(torch.stack(view[chosen]), ROWS[[4, 29, 4, 0]])
    assert torch.equal(torch.stack(view[torch.tensor(chosen)]), ROWS[[4, 29, 4, 0]])
    assert torch.equal(view[np.int16(scattered[9])], ROWS[9])
    assert torch.equal(view[torch.tensor(scattered[9])], ROWS[9])
    texts = [f"sound {i}" for i in range(30)]
    view = Store(plain(tmp_path / "texts", ROWS, texts))["conv"]
    for make in (list, np.array, lambda ids: np.array(ids, object)):
        assert torch.equal(torch.stack(view[make(["sound 11", "sound 2"])]), ROWS[[11, 2]])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 30], OutOfRange, "no sample has the id 30"),
        ([-1], OutOfRange, "no sample has the id -1"),
        ([3, 2**70], OutOfRange, f"no sample has the id {2**70}"),
        (2**70, OutOfRange, f"no sample has the id {2**70}"),
        (np.array([2**64 - 1], np.uint64), OutOfRange, "no sample has the id"),
        (["3"], OutOfRange, "no sample has the id '3'"),
        ([1.0], InvalidType, "a list that is not all ints, all texts or all bools"),
        ([1, True], InvalidType, "a list that is not all ints"),
        ([[1, 2]], InvalidType, "a list that is not all ints"),
        (np.array([1.0]), InvalidType, "an array of float64 with 1 axes, which does not select samples"),
        (np.array([[1]]), InvalidType, "an array of int64 with 2 axes, which does not select samples"),
        (torch.tensor([0.5]), InvalidType, "a list that is not all ints"),
        ((1, 2), InvalidType, r"a tuple, which does not select samples\. Pass a list of ids: view\[\[1, 2\]\]"),
        ([True, False], InvalidValue, "the mask has 2 entries for 30 samples"),
        (None, OutOfRange, "no sample has the id None"),
        (True, OutOfRange, "no sample has the id True"),
    ],
)
def test_what_selects_no_samples_is_an_error(tmp_path, ids, error, message):
    view = Store(plain(tmp_path, ROWS))["conv"]
    with pytest.raises(error, match=message):
        view[ids]


def test_an_id_of_several_samples_is_an_error_also_among_many(tmp_path):
    view = Store(plain(tmp_path, ROWS[:6], [5, 6, 5, 7, 8, 9]))["conv"]
    with pytest.raises(StoreError, match="several samples have the id 5"):
        view[[6, 5]]
    assert torch.equal(torch.stack(view[[9, 6]]), ROWS[[5, 1]])


DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.complex64, torch.uint16, torch.bool, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (2, 0)], ids=str)
def test_rows_of_every_dtype_and_shape_come_back(tmp_path, dtype, shape, way):
    rows = (4 * drawn(9, *shape)).to(dtype)
    store = Store(plain(tmp_path, rows), **way)
    assert same(store["conv"][4], rows[4])
    assert all(same(row, rows[i]) for row, i in zip(store["conv"][[8, 0, 5]], (8, 0, 5), strict=True))
    batch = store.dataset().__getitems__([8, 0, 5])
    assert all(same(sample[1]["conv"], rows[i]) for sample, i in zip(batch, (8, 0, 5), strict=True))
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float8_e4m3fn) else dtype
    assert same(torch.from_numpy(store.numpy("conv")), rows.to(wide))


# -- batches of a data set


def samples_alike(found, expected):
    assert len(found) == len(expected)
    for (id, outputs, *label), (id_, outputs_, *label_) in zip(found, expected, strict=True):
        assert (id, list(outputs), label) == (id_, list(outputs_), label_)
        assert all(same(outputs[key], outputs_[key]) for key in outputs)


def test_a_batch_holds_the_samples_of_its_positions(tmp_path, way):
    first, second, labels = drawn(20, 3, 4), [drawn(i % 3 + 1, seed=i) for i in range(20)], torch.arange(20) * 10
    batches = [
        Batch(n, list(range(100 + 4 * n, 104 + 4 * n)), {"a": first[s], "b[0]": second[s]}, labels[s])
        for n, s in enumerate(slice(4 * n, 4 * n + 4) for n in range(5))
    ]
    store = Store(written(tmp_path, [batches[:2], batches[2:4], batches[4:]]), **way)
    places = [19, -20, 3, 3, -1, 8, 7]
    data = store.dataset()
    expected = [(100 + p % 20, {"a": first[p], "b[0]": second[p]}, labels[p]) for p in places]
    samples_alike(data.__getitems__(places), expected)
    samples_alike([data[place] for place in places], expected)
    samples_alike(Subset(data, places).__getitems__([1, 0]), [expected[1], expected[0]])
    samples_alike(data.__getitems__([]), [])
    named = store.dataset("a", labels=lambda id: -id).__getitems__(torch.tensor([4, 2]))
    samples_alike(named, [(104, {"a": first[4]}, -104), (102, {"a": first[2]}, -102)])
    with pytest.raises(OutOfRange, match="position 20 is out of range"):
        data.__getitems__([0, 20])
    with pytest.raises(TypeError):
        data.__getitems__([0.0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_are_found_wherever_their_batches_lie(data):
    """Batches in any order over the shards, some of them twice, and layers that run in some batches only."""
    numbers = data.draw(st.permutations(range(data.draw(st.integers(1, 7)))))
    again = data.draw(st.lists(st.sampled_from(list(numbers)), max_size=2))
    kept, samples = {}, {}
    for number in numbers:
        size = data.draw(st.integers(0, 3))
        ids = [10 * number + row for row in range(size)]
        columns = {}
        for key in data.draw(st.sampled_from([("a", "b"), ("a",), ("b",), ("b", "a")])):
            if key == "a":
                columns[key] = drawn(size, 2, seed=number)
            elif size:
                columns[key] = [drawn(data.draw(st.integers(0, 3)), seed=row) for row in range(size)]
        kept[number] = Batch(number, ids, columns)
        for row, id in enumerate(ids):
            samples[id] = {key: rows[row] for key, rows in columns.items()}
    order = [kept[number] for number in (*numbers, *again)]
    cuts = sorted({0, len(order), *data.draw(st.lists(st.integers(0, len(order)), max_size=3))})
    shards = [order[first:last] for first, last in pairwise(cuts)]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), shards)
        for way in WAYS.values():
            store = Store(path, **way)
            assert store.ids == sorted(samples)
            for id, outputs in samples.items():
                assert all(same(row, outputs[key]) for key, row in store.sample(id).items())
                assert set(store.sample(id)) == set(outputs)
            for key in store.layers:
                having = [id for id in sorted(samples) if key in samples[id]]
                absent = [id for id in samples if key not in samples[id]]
                assert all(
                    same(a, samples[id][key]) for a, id in zip(store[key][having[::-1]], having[::-1], strict=True)
                )
                mask = np.arange(len(having)) % 2 == 0
                assert all(same(a, samples[id][key]) for a, id in zip(store[key][mask], having[::2], strict=True))
                if absent:
                    with pytest.raises(NotCaptured, match=f"did not run for the sample {absent[0]}"):
                        store[key][[*having, absent[0]]]
                found = store.dataset(key)
                expected = [(id, {key: samples[id][key]}) for id in having]
                samples_alike(found.__getitems__(range(len(found))), expected)


def test_a_batch_is_one_read_for_each_run_of_rows_in_order_of_place(tmp_path, monkeypatch):
    store = Store(plain(tmp_path, ROWS, batch=5), mmap=False)
    data = store.dataset()
    seen = []
    original = os.preadv

    def counted(file, buffers, offset):
        seen.append((file, offset, sum(len(buffer) for buffer in buffers)))
        return original(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    batch = data.__getitems__([12, 3, 11, 29, 2, 10, 17])
    row = 3 * 5 * 4
    assert [size for *_, size in seen] == [2 * row, 3 * row, row, row]  # 2 and 3; 10 to 12 and 17; 29
    assert seen[1][:2] < seen[2][:2]
    assert torch.equal(torch.stack([outputs["conv"] for _, outputs in batch]), ROWS[[12, 3, 11, 29, 2, 10, 17]])


def test_workers_that_are_spawned_read_batches_in_order(tmp_path, way):
    data = pickle.loads(pickle.dumps(Store(plain(tmp_path, ROWS), **way).dataset(labels=itself)))
    samples_alike(data.__getitems__([5, 29]), [(5, {"conv": ROWS[5]}, 5), (29, {"conv": ROWS[29]}, 29)])
    if way:
        return  # one of the ways through a process is enough
    loader = DataLoader(data, batch_size=8, num_workers=1, multiprocessing_context="spawn", collate_fn=data.collate)
    ids, outputs = zip(*((batch[0], batch[1]["conv"]) for batch in loader), strict=True)
    assert [id for some in ids for id in some] == list(range(30))
    assert torch.equal(torch.cat(outputs), ROWS)


def itself(id):
    return id


# -- memory and maps


def test_rows_own_their_memory_unless_copy_is_false(tmp_path):
    path = plain(tmp_path, ROWS)
    store, shared = Store(path), Store(path, copy=False)
    for row in (
        *store["conv"][[3, 4]],
        store.sample(3)["conv"],
        *store["conv"][3:5],
        Store(path, mmap=False)["conv"][3],
    ):
        assert row.untyped_storage().nbytes() == 3 * 5 * 4
        row.fill_(7)
    assert torch.equal(store["conv"][3], ROWS[3])
    row = shared["conv"][3]
    assert row.data_ptr() == shared["conv"][[3]][0].data_ptr() == shared.dataset()[3][1]["conv"].data_ptr()
    row.fill_(7)
    assert torch.equal(shared["conv"][4], ROWS[4])
    assert torch.equal(store["conv"][3], ROWS[3])  # the file and other stores never see it
    assert not store.verify()
    del shared
    assert (row == 7).all()
    with pytest.raises(InvalidValue, match="copy=False has no effect"):
        Store(path, mmap=False, copy=False)


def test_open_shards_are_bounded(tmp_path, monkeypatch, way):
    monkeypatch.setattr(store_reader, "most_open", lambda: 3)
    store = Store(plain(tmp_path, drawn(200, 2), batch=5, batches=1), **way)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert torch.equal(torch.stack(list(store["conv"])), drawn(200, 2))
        assert torch.equal(torch.stack(store["conv"][range(199, -1, -1)]), drawn(200, 2).flip(0))
        if way != {"copy": False}:  # there the rows hold their shards
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_process_keeps_a_quarter_of_its_files_for_shards(monkeypatch):
    import resource

    for soft, most in ((1024, 256), (10**6, 4096), (16, 8), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert store_reader.most_open() == most


def test_threads_read_the_right_rows_while_shards_open_and_close(tmp_path, monkeypatch, way):
    monkeypatch.setattr(store_reader, "most_open", lambda: 1)
    rows = drawn(60, 50)
    view = Store(plain(tmp_path, rows, batches=1), **way)["conv"]
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 60, 300).tolist():
            if not torch.equal(view[i], rows[i]):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def opened_as(store):
    store["conv"][0]
    (shard,) = store._reader._open.values()
    return type(shard.file)


def test_shards_on_a_network_file_system_are_read_by_calls(tmp_path, monkeypatch):
    path = plain(tmp_path, ROWS)
    assert opened_as(Store(path)) is MappedFile
    device = os.stat(path).st_dev
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(file_system, "_MOUNTS", mounts)
    for kind, file in (("nfs4", CalledFile), ("fuse.sshfs", CalledFile), ("ext4", MappedFile), ("fuseblk", MappedFile)):
        number = f"{os.major(device)}:{os.minor(device)}"
        other = b"21 1 9:9 / / rw - nfs host:/ rw\n22 1 9:8 / /gr\xf6\xdfe\x85\x0c rw - nfs host:/ rw\n"  # in Latin-1
        mounts.write_bytes(other + f"36 35 {number} / /mnt rw,noatime master:1 - {kind} x rw\n".encode())
        assert opened_as(Store(path)) is file
        assert opened_as(Store(path, mmap=True)) is MappedFile
    mounts.unlink()
    assert opened_as(Store(path)) is MappedFile


def test_a_file_system_without_maps_is_read_by_calls_unless_maps_were_asked_for(tmp_path, monkeypatch):
    path = plain(tmp_path, ROWS)

    def refused(*args, **options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert opened_as(Store(path)) is CalledFile
    row = Store(path, copy=False)["conv"][7]
    assert torch.equal(row, ROWS[7])
    batch = Store(path, copy=False).dataset().__getitems__([7, 2])
    assert torch.equal(torch.stack([outputs["conv"] for _, outputs in batch]), ROWS[[7, 2]])
    with pytest.raises(
        StoreError, match=r"shard-000000.safetensors' cannot be mapped: .*No such device.* Pass mmap=False"
    ):
        Store(path, mmap=True)["conv"][0]


# -- shards that change while a store is open


def test_a_shard_that_was_cut_is_an_error_and_no_crash(tmp_path, way):
    path = plain(tmp_path, drawn(30, 5000))
    store = Store(path, **way)
    data = store.dataset()
    store["conv"][0]  # the first shard is open now
    for shard in (0, 1):
        file = path / "rank-00000" / f"shard-{shard:06d}.safetensors"
        os.truncate(file, 5000)
        for read in (lambda at: store["conv"][at], lambda at: store["conv"][[at, at]], data.__getitem__):
            with pytest.raises(
                StoreError, match=rf"{file.name}' was whole .*truncated: it has 5000 bytes instead of \d+"
            ):
                read(8 * shard + 7)


def test_an_open_store_reads_on_while_its_open_shards_are_deleted_or_replaced(tmp_path, way):
    path = plain(tmp_path, ROWS)
    store = Store(path, **way)
    store["conv"][0]
    first, second, third, *_ = sorted((path / "rank-00000").iterdir())
    first.unlink()
    assert torch.equal(torch.stack(store["conv"][0:8]), ROWS[:8])
    os.utime(second)  # touched, and copied: still the same rows
    third.write_bytes(third.read_bytes())
    assert torch.equal(torch.stack(store["conv"][8:24]), ROWS[8:24])
    reopened = Store(path, **way)
    second.unlink()
    with pytest.raises(
        StoreError, match=r"shard-000001.safetensors' was whole when the store was opened, but now it is not"
    ):
        reopened["conv"][8]
    write_shard(third, [Batch(9, [1], {"conv": ROWS[:1]})])
    with pytest.raises(
        StoreError, match=r"shard-000002.safetensors' was replaced after the store was opened\. Open it again"
    ):
        reopened["conv"][16]


def test_a_disk_that_fails_is_an_error_where_shards_are_read_by_calls(tmp_path, monkeypatch):
    store = Store(plain(tmp_path, ROWS), mmap=False)
    store["conv"][0]

    def failing(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StoreError, match=r"shard-000000.safetensors' cannot be read: .*Input/output error"):
        store["conv"][1]


def test_a_damaged_shard_that_cannot_be_set_aside_is_an_error(tmp_path, monkeypatch):
    path = plain(tmp_path, ROWS)
    file = path / "rank-00000" / "shard-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    def in_use(*paths):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(os, "replace", in_use)
    with (
        RankFolder(path, 0) as own,
        pytest.raises(StoreError, match=r"shard-000001.*is damaged and cannot be set aside: "),
    ):
        set_bad_aside(path, own, 0, 1, False)
