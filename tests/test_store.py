"""Reading a store: by id, by position, frames, data sets, arrays, and what it costs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from convtap._dataset.column import ColumnReader
from convtap._dataset.extract import extract
from convtap._dataset.shard_file import CalledFile, MappedFile
from convtap._dataset.shard_format import Batch, write_shard
from convtap._dataset.shard_reader import Shard
from convtap._dataset.store import Store
from convtap._errors import InvalidType, InvalidValue, LayerNotFound, OutOfRange, StoreError, Unsupported
from tests.reference import same

X = torch.randn(23, 1, 20, generator=torch.Generator().manual_seed(1))


def numbered(lengths, channels=2):
    """Rows whose every number tells sample and frame: channel 0 holds 1000 sample + frame, channel 1 its negative."""
    rows = []
    for i, length in enumerate(lengths):
        frame = 1000.0 * i + torch.arange(float(length))
        rows.append(torch.stack([frame, -frame][:channels]))
    return rows


def write(path, rows, batch=3, key="conv", ids=None):
    """A store with these rows, through extract: the model hands its input on as a layer's output."""
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    places = [list(range(start, min(start + batch, len(rows)))) for start in range(0, len(rows), batch)]

    class Rows(nn.Module):
        def forward(self, x):
            return x

    data = list(zip(batches, places, strict=True))
    model = nn.ModuleDict({key: Rows()})
    model.forward = lambda x: model[key](x)
    return extract(
        model,
        data,
        path,
        key,
        types=Rows,
        inputs=lambda item: ((nn.utils.rnn.pad_sequence([row.T for row in item[0]], batch_first=True).mT,), {}),
        ids=(lambda item: item[1]) if ids is None else (lambda item: [ids[i] for i in item[1]]),
        shard_bytes=300,
        progress=False,
    )


def readers(file, key):
    """What reads a layer's rows in a shard: through a map, and by calls."""
    size = file.stat().st_size
    return [
        ColumnReader(Shard(file).column(key), opened)
        for opened in (MappedFile(file, "s", size, copies=True), CalledFile(file, "s", size))
    ]


def reads(monkeypatch):
    """The sizes of the parts of files that are read by calls from here on."""
    seen = []
    original = os.preadv

    def counted(file, buffers, offset):
        seen.append(sum(len(buffer) for buffer in buffers))
        return original(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return seen


@pytest.fixture
def uniform(tmp_path):
    return write(tmp_path / "uniform", numbered([5] * 10))


@pytest.fixture
def ragged(tmp_path):
    """Whole batches are padded to 4, 6 and 3 frames."""
    return write(tmp_path / "ragged", numbered([4, 2, 4, 6, 1, 1, 3, 3, 3]))


# -- views


def test_a_view_is_read_by_id_by_slices_and_by_iteration(uniform):
    view, rows = uniform["conv"], numbered([5] * 10)
    assert torch.equal(view[7], rows[7])
    assert torch.equal(view[np.int64(7)], rows[7])
    assert torch.equal(torch.stack(view[2:9:3]), torch.stack(rows[2:9:3]))
    assert torch.equal(torch.stack(view[::-1]), torch.stack(rows[::-1]))
    assert torch.equal(torch.stack(list(view)), torch.stack(rows))
    assert (view.shape, view.dtype, len(view), view.absent) == ((10, 2, 5), torch.float32, 10, [])
    assert repr(view) == "<conv: (10, 2, 5) float32>"


def test_ragged_rows_come_back_in_their_own_shapes(ragged):
    view = ragged["conv"]
    assert [row.shape[-1] for row in view] == [4, 4, 4, 6, 6, 6, 3, 3, 3]
    assert view.shape == (9, 2, None)
    assert repr(view) == "<conv: (9, 2, …) float32>"
    assert torch.equal(view[3], numbered([4, 2, 4, 6])[3])


def test_a_row_owns_its_bytes_and_writing_it_changes_nothing(uniform):
    row = uniform["conv"][4]
    row.fill_(7)
    assert row.untyped_storage().nbytes() == 2 * 5 * 4
    assert torch.equal(uniform["conv"][4], numbered([5] * 5)[4])
    assert not uniform.verify()


def test_ids_that_are_not_there_and_keys_that_are_none(uniform, ragged):
    with pytest.raises(
        OutOfRange, match=r"no sample has the id 99\. Pass one of the 10 ids \(0, 1, 2, …\), or a slice"
    ):
        uniform["conv"][99]
    with pytest.raises(OutOfRange, match="no sample has the id -1"):
        uniform["conv"][-1]
    with pytest.raises(OutOfRange, match="no sample has the id '3'"):
        uniform["conv"]["3"]
    with pytest.raises(OutOfRange, match=r"no sample has the id 1\.0"):
        uniform.sample(1.0)
    with pytest.raises(LayerNotFound, match=r"the store has no layer 'cnv'\. It has: conv\. Did you mean 'conv'\?"):
        uniform["cnv"]
    with pytest.raises(InvalidType, match=r"store\[3\] is not indexed by a layer name.*store\.sample\(id\)"):
        uniform[3]
    assert "conv" in uniform
    assert "cnv" not in uniform
    assert list(uniform) == ["conv"]


def test_text_ids_are_found(tmp_path):
    names = ["b/1", "a", "ü", "", "z" * 200]
    store = write(tmp_path, numbered([3] * 5), ids=names)
    assert store.ids == names
    for i, name in enumerate(names):
        assert store["conv"][name][0, 0] == 1000 * i
    with pytest.raises(OutOfRange, match="no sample has the id 'zz'"):
        store.sample("zz")
    with pytest.raises(OutOfRange, match="no sample has the id 0"):
        store.sample(0)


@pytest.mark.parametrize("key", ["../../escape", "a/b", "__metadata__", "ids", "con", "x" * 300, "名前"])
def test_layer_names_never_become_paths(key, tmp_path):
    key = key.replace(".", "_") if "." in key else key  # torch allows no dot in a module's name
    store = write(tmp_path / "s", numbered([3] * 4), key=key)
    assert store.layers == [key]
    assert store[key][3][0, 0] == 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_numpy_is_one_array_and_ragged_rows_are_refused(uniform, ragged):
    assert np.array_equal(uniform.numpy("conv"), torch.stack(numbered([5] * 10)).numpy())
    with pytest.raises(Unsupported, match=r"the rows of 'conv' differ in shape or dtype.*reduce="):
        ragged.numpy("conv")


# -- data sets


def test_a_data_set_yields_id_and_outputs_and_collates_ragged_rows(ragged):
    data = ragged.dataset("conv")
    assert len(data) == 9
    assert data[3][0] == 3
    assert torch.equal(data[-1][1]["conv"], ragged["conv"][8])
    ids, outputs, lengths = next(iter(DataLoader(data, batch_size=5, collate_fn=data.collate)))
    assert ids == [0, 1, 2, 3, 4]
    assert outputs["conv"].shape == (5, 2, 6)
    assert lengths["conv"].tolist() == [4, 4, 4, 6, 6]
    assert torch.equal(outputs["conv"][0, :, :4], ragged["conv"][0])
    assert not outputs["conv"][0, :, 4:].any()
    with pytest.raises(OutOfRange, match="position 9 is out of range, since the data set has 9 samples"):
        data[9]


def test_labels_come_by_id_from_a_dict_or_a_function(uniform):
    data = uniform.dataset("conv", labels={i: 2 * i for i in range(10)})
    ids, _, _, labels = next(iter(DataLoader(data, batch_size=4, collate_fn=data.collate)))
    assert labels.tolist() == [2 * i for i in ids]
    assert uniform.dataset(labels=lambda id: -id)[3][2] == -3
    with pytest.raises(InvalidValue, match="labels has no entry for the id 5"):
        uniform.dataset(labels={1: 1})[5]
    with pytest.raises(InvalidType, match=r"labels is a list.*dict\(enumerate\(labels\)\)"):
        uniform.dataset(labels=[1, 2])
    with pytest.raises(InvalidValue, match="layers is empty"):
        uniform.dataset([])


def test_a_store_and_its_data_set_go_to_other_processes(uniform):
    uniform["conv"][1]
    data = uniform.dataset()
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[4][1]["conv"], data[4][1]["conv"])
    loader = DataLoader(data, batch_size=5, num_workers=1, multiprocessing_context=multiprocessing.get_context("fork"))
    assert torch.equal(torch.cat([outputs["conv"] for _, outputs in loader]), torch.stack(numbered([5] * 10)))


# -- frames


def frame_numbers(batches):
    return [int(value) for batch in batches for value in batch[:, 0]]


def all_frames(shapes):
    return [1000 * i + t for i, length in enumerate(shapes) for t in range(length)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n", [1, 4, 1000])
def test_frames_yields_every_frame_once(shuffle, n, ragged):
    batches = list(ragged["conv"].frames(n, shuffle=shuffle))
    assert all(batch.shape == (n, 2) for batch in batches[:-1])
    assert all(torch.equal(batch[:, 0], -batch[:, 1]) for batch in batches)
    numbers = frame_numbers(batches)
    # padded frames are zero, and a batch is padded to its longest row
    kept = [4, 2, 4, 6, 1, 1, 3, 3, 3]
    padding = sum(longest * 3 for longest in (4, 6, 3)) - sum(kept)
    assert sorted(numbers) == sorted(all_frames(kept) + [0] * padding)


def test_frames_are_shuffled_by_the_seed_and_in_order_without(uniform):
    view, ordered = uniform["conv"], all_frames([5] * 10)
    assert frame_numbers(view.frames(7, shuffle=False)) == ordered
    first, again, other = (frame_numbers(view.frames(7, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert first != ordered
    assert sorted(first) == sorted(other) == ordered


def test_a_shuffled_batch_of_frames_is_from_everywhere_in_bounded_memory(tmp_path, monkeypatch):
    import convtap._dataset.views as views
    from convtap._dataset.layer_rows import LayerRows

    monkeypatch.setattr(views, "_POOL_BYTES", 0)  # the pool then is 16 batches
    store = write(tmp_path, numbered([20] * 150), batch=50)
    view, read, most = store["conv"], 0, 0
    original = LayerRows.at

    def counted(self, position):
        nonlocal read
        read += 20
        return original(self, position)

    monkeypatch.setattr(LayerRows, "at", counted)
    given = 0
    for number, batch in enumerate(view.frames(32)):
        most = max(most, read - given)
        given += len(batch)
        if number < 90:
            samples = {int(value) // 1000 for value in batch[:, 0]}
            assert len(samples) >= 10  # of 32 frames, from a pool of at least 13 rows
    assert given == 3000
    assert most <= 17 * 32 + 20


def test_rows_without_time_are_one_frame_each_and_others_are_refused(tmp_path):
    conv = nn.Sequential(nn.Conv1d(1, 3, 3))
    data = TensorDataset(X)
    store = extract(conv, data, tmp_path / "a", reduce=lambda t: t.mean(-1), batch_size=4, progress=False)
    assert torch.equal(torch.cat(list(store["0"].frames(5, shuffle=False))), torch.from_numpy(store.numpy("0")))
    with pytest.raises(InvalidValue, match="n=0 is not a positive int"):
        store["0"].frames(0)
    store = extract(conv, data, tmp_path / "b", reduce=lambda t: t[:, None], progress=False)
    with pytest.raises(Unsupported, match=r"the rows of '0' are not \(C, T\), \(T, C\) or \(C,\)"):
        store["0"].frames(5)


# -- what it costs


def test_a_read_touches_only_its_own_bytes(tmp_path, monkeypatch):
    write(tmp_path, numbered([5] * 6), batch=6)
    seen = reads(monkeypatch)
    Store(tmp_path, mmap=False)["conv"][4]
    assert seen == [2 * 5 * 4]


# -- shards


def test_a_shard_holds_batches_with_layers_that_come_and_go(tmp_path):
    file = tmp_path / "shard"
    first, second = torch.arange(12.0).view(3, 4), torch.arange(10.0).view(2, 5)
    batches = [
        Batch(4, ["a", "b", "c"], {"x": first}, torch.tensor([1, 2, 3])),
        Batch(9, [], {}, torch.zeros(0, dtype=torch.int64)),
        Batch(7, ["d", "e"], {"y": [second[0], second[1, :3]], "x": second}, torch.tensor([4, 5])),
    ]
    size = write_shard(file, batches)
    assert size == file.stat().st_size
    shard = Shard(file)
    assert shard.batches == [(4, 3), (9, 0), (7, 2)]
    assert shard.ids() == ["a", "b", "c", "d", "e"]
    assert torch.equal(shard.labels(), torch.tensor([1, 2, 3, 4, 5]))
    assert shard.begins("x") == [0, -1, 3]
    assert shard.begins("y") == [-1, -1, 0]
    for reader in readers(file, "x"):
        assert [reader.row(i).tolist() for i in range(5)] == first.tolist() + second.tolist()
    for reader in readers(file, "y"):
        assert [reader.row(i).tolist() for i in range(2)] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert shard.problem() is None


def test_rows_with_different_numbers_of_axes_are_kept(tmp_path):
    rows = [torch.tensor(5.0), torch.ones(2), torch.ones(2, 0, 3)]
    write_shard(tmp_path / "s", [Batch(0, [0, 1, 2], {"x": rows})])
    for reader in readers(tmp_path / "s", "x"):
        read = [reader.row(i) for i in range(3)]
        assert [tuple(row.shape) for row in read] == [(), (2,), (2, 0, 3)]
        assert read[0] == 5


@pytest.mark.parametrize("make", [lambda: X.to_sparse(), lambda: X.to("meta")])
def test_what_has_no_form_on_disk_is_said(make, tmp_path):
    with pytest.raises(StoreError, match=r"the output of 'x' is .*which a shard cannot store.*dequantize"):
        write_shard(tmp_path / "s", [Batch(0, [0], {"x": make()})])


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool, torch.complex64]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_written_comes_back(data):
    """Batches of any sizes, with layers that come and go, of one shape or ragged."""
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    dtypes = {key: data.draw(st.sampled_from(DTYPES)) for key in ("a", "b[0]", "layer:c")}
    batches = []
    for number, size in enumerate(sizes):
        columns = {}
        for key, dtype in dtypes.items():
            kind = data.draw(st.sampled_from(["absent", "stacked", "ragged"]))
            lengths = [data.draw(st.integers(0, 5)) for _ in range(size)]
            if kind == "stacked":
                columns[key] = torch.randn(size, 2, 3, generator=draw).to(dtype)
            elif kind == "ragged" and size:
                columns[key] = [torch.randn(2, length, generator=draw).to(dtype) for length in lengths]
        batches.append(Batch(number, [10 * number + row for row in range(size)], columns))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shard"
        write_shard(file, batches)
        shard = Shard(file)
        assert shard.problem() is None
        assert shard.ids() == [id for batch in batches for id in batch.ids]
        for key in dtypes.keys() & {key for batch in batches for key in batch.columns}:
            expected = [row for batch in batches for row in batch.columns.get(key, ())]
            begin = accumulate((len(batch.columns.get(key, ())) for batch in batches), initial=0)
            assert shard.begins(key) == [
                row if key in batch.columns else -1 for row, batch in zip(begin, batches, strict=False)
            ]
            for reader in readers(file, key):
                assert all(same(reader.row(i), row) for i, row in enumerate(expected))
        with safe_open(file, framework="pt") as other:
            assert set(other.keys()) == set(shard._parts)


def test_a_store_of_many_layers_prints_its_first_and_last(tmp_path):
    model = nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(150)))
    store = extract(model, TensorDataset(torch.zeros(2, 1, 4)), tmp_path / "s", batch_size=2, progress=False)
    lines = str(store).splitlines()
    assert [line.split()[0] for line in (lines[3], lines[52], lines[54], lines[103])] == ["0", "49", "100", "149"]
    assert lines[53] == "… 50 more rows …"
    assert lines[-1] == "100 of 150 rows shown: print(store.summary(rows=None)) shows all"
    assert len(str(store.summary(rows=None)).splitlines()) == 153
    assert store._repr_html_().count("<tr>") == 103  # two headings: the rows beyond 30 are folded


def test_the_message_of_a_wrong_index_is_short(uniform):
    with pytest.raises(InvalidType, match="a list that is not all ints, all texts or all bools") as caught:
        uniform["conv"][[*range(100_000), "a"]]
    assert len(str(caught.value)) < 500
