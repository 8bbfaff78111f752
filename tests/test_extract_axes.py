"""Rows of a store that are (T, C): every reader gives what it gives of the (C, T) rows of a twin of the network."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

os.environ["KERAS_BACKEND"] = "torch"

from convtap import Store, StoreError, Unsupported
from convtap._dataset.extract import extract
from convtap._errors import InvalidValue
from tests.reference import same

LENGTHS = [9, 4, 7, 7, 2, 9, 5]


class First(nn.Module):
    """(B, 3, T) → (B, 5, T)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(3, 5, 1)

    def forward(self, x):
        return self.layer(x)


class Last(nn.Module):
    """The same numbers as (B, T, 5), from (B, 3, T): a kernel of one frame is a linear layer."""

    def __init__(self, twin):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.layer.weight = nn.Parameter(twin.layer.weight[:, :, 0].detach().clone())
        self.layer.bias = twin.layer.bias

    def forward(self, x):
        return self.layer(x.mT)


class Block(nn.Module):
    """A layer whose type says nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1


class Around(nn.Module):
    """A block by the name of the twins' layer."""

    def __init__(self, inner):
        super().__init__()
        self.layer = Block(inner)

    def forward(self, x):
        return self.layer(x)


def sounds():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, length, generator=generator, dtype=torch.float64) for length in LENGTHS]


def padded(rows):
    longest = max(row.shape[1] for row in rows)
    return torch.stack([nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])


def batches(size=3):
    rows = sounds()
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def given(rows):
    return (padded(rows),), {}


def lengths_of(rows):
    return [row.shape[1] for row in rows]


def both(path, *, data=None, types=(nn.Conv1d, nn.Linear), wrap=lambda model: model, **options):
    """The stores of both twins: rows (C, T), and rows (T, C)."""
    torch.manual_seed(1)
    first = First().double()
    last = Last(first).double()
    options = {"inputs": given, "lengths": lengths_of, "progress": False, **options}
    return [
        extract(wrap(model), data or batches(), path / name, "layer", types=types, **options)
        for name, model in (("first", first), ("last", last))
    ]


def expected_rows():
    """What the layer makes of each sound alone, (C, T), by NumPy."""
    torch.manual_seed(1)
    layer = First().double().layer
    weight, bias = layer.weight[:, :, 0].detach().numpy(), layer.bias.detach().numpy()
    return [weight @ row.numpy() + bias[:, None] for row in sounds()]


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrap", [lambda model: model, Around], ids=["known by its type", "known by the timeline"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "whole batches"])
def test_every_reader_of_both_twins_gives_the_same(tmp_path, wrap, cut):
    options = {} if cut else {"lengths": None}
    types = (Block,) if wrap is Around else (nn.Conv1d, nn.Linear)
    stores = both(tmp_path, wrap=wrap, types=types, **options)
    a, b = (store["layer"] for store in stores)
    assert (a.time_dim, b.time_dim) == (-1, -2)
    assert repr(b).endswith(", time is axis -2>")
    assert (a.shape[1], b.shape[2]) == (5, 5)
    rows = expected_rows()
    if cut:
        for left, right, row in zip(a, b, rows, strict=True):
            close(left, row)
            close(right, row.T)
    for left, right in zip(a, b, strict=True):
        close(right.mT, left.numpy())
    ordered = [torch.cat(list(view.frames(4, shuffle=False))) for view in (a, b)]
    close(ordered[1], ordered[0].numpy())
    mixed = [torch.cat(list(view.frames(4, seed=3))) for view in (a, b)]
    close(mixed[1], mixed[0].numpy())
    if cut:
        close(ordered[1], np.concatenate(rows, axis=1).T)
    ready = [store.dataset() for store in stores]
    for left, right in zip(*(DataLoader(data, batch_size=3, collate_fn=data.collate) for data in ready), strict=True):
        assert left[0] == right[0]
        close(right[1]["layer"].mT, left[1]["layer"].numpy())
        assert torch.equal(left[2]["layer"], right[2]["layer"])
        if cut:
            assert right[2]["layer"].tolist() == [LENGTHS[id] for id in right[0]]
            for position, id in enumerate(right[0]):
                found = right[1]["layer"][position]
                close(found[: LENGTHS[id]], rows[id].T)
                assert not found[LENGTHS[id] :].any()


def test_an_array_of_rows_of_one_length_is_the_transpose(tmp_path):
    data = [torch.stack([row[:, :2] for row in rows]) for rows in batches()]
    a, b = both(tmp_path, data=data, inputs=None, lengths=None)
    close(b.numpy("layer").transpose(0, 2, 1), a.numpy("layer"))
    assert b.numpy("layer").shape == (7, 2, 5)
    with pytest.raises(Unsupported, match=r"reduce=lambda t: t\.mean\(-2\)"):
        both(tmp_path / "ragged")[1].numpy("layer")


def test_a_reopened_store_knows_the_time_axis(tmp_path):
    _, b = both(tmp_path, shard_bytes=1)
    for _ in range(2):
        again = Store(b.path)
        assert again["layer"].time_dim == -2
        assert same(list(again["layer"]), list(b["layer"]))


def older(store):
    """The store as an earlier version wrote it: nothing of the time axis in its shards."""
    from convtap._dataset.shard_format import header_checksum
    from convtap._dataset.shard_reader import Shard

    for path in store.path.glob("rank-*/*.safetensors"):
        content = path.read_bytes()
        room = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + room])
        about = json.loads(header["__metadata__"]["convtap"])
        for column in about["columns"].values():
            assert column.pop("time", 0) != 0
        metadata = {"convtap": json.dumps(about)}
        header["__metadata__"] = metadata
        metadata["crc32"] = header_checksum(header)
        text = json.dumps(header).encode()
        assert len(text) <= room
        path.write_bytes(content[:8] + text.ljust(room) + content[8 + room :])
        assert Shard(path).problem() is None
    return Store(store.path)


def test_an_older_store_means_the_last_axis_unless_its_rows_tell(tmp_path):
    a, b = (older(store) for store in both(tmp_path))
    assert (a["layer"].time_dim, b["layer"].time_dim) == (-1, -2)  # the only axis that varies
    close(next(b["layer"].frames(3, shuffle=False)), next(a["layer"].frames(3, shuffle=False)).numpy())
    data = [torch.stack([row[:, :2] for row in rows]) for rows in batches()]
    _, fixed = both(tmp_path / "fixed", data=data, inputs=None, lengths=None)
    fixed = older(fixed)
    assert fixed["layer"].time_dim == -1
    assert "taken" not in repr(fixed["layer"])
    assert next(fixed["layer"].frames(100, shuffle=False)).shape == (35, 2)


def test_old_and_new_shards_of_one_store_agree(tmp_path):
    _, b = both(tmp_path, shard_bytes=1)
    whole = [row.clone() for row in b["layer"]]
    files = sorted(b.path.glob("rank-*/*.safetensors"))
    files[-1].unlink()
    older(b)
    _, again = both(tmp_path, shard_bytes=1)
    assert again["layer"].time_dim == -2
    assert same(list(again["layer"]), whole)


def test_calls_of_a_layer_are_joined_on_its_time_axis(tmp_path):
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            self.inner(x[..., :4])
            return self.inner(x[..., 4:])

    data = [torch.stack([row[:, :2].repeat(1, 3) for row in rows]) for rows in batches()]
    torch.manual_seed(1)
    first = First().double()
    last = Last(first).double()
    options = {"calls": "cat", "types": (nn.Conv1d, nn.Linear), "progress": False}
    a = extract(Twice(first), data, tmp_path / "a", "inner.layer", **options)["inner.layer"]
    b = extract(Twice(last), data, tmp_path / "b", "inner.layer", **options)["inner.layer"]
    assert a.shape == (7, 5, 6)
    assert b.shape == (7, 6, 5)
    close(b.numpy().transpose(0, 2, 1), a.numpy())


# -- other layouts


class TimeFirst(nn.Module):
    """A layer that takes (T, B, C), in a model that takes (B, C, T)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(2, 0, 1)).transpose(0, 1)


class Attention(nn.MultiheadAttention):
    """Attends to its own input; gives (T, B, C) and the weights (B, T, T)."""

    def forward(self, x):
        y, self.weights = super().forward(x, x, x)
        return y


@pytest.mark.parametrize(
    "layer",
    [Attention(3, 1), nn.TransformerEncoderLayer(3, 1, 6, dropout=0.0), Block(nn.Linear(3, 5))],
    ids=["attention", "transformer", "by the timeline"],
)
@pytest.mark.parametrize("size", [2, 7], ids=["fewer samples than frames", "as many"])
def test_rows_of_time_first_layers_are_those_of_the_samples(tmp_path, layer, size):
    model = TimeFirst(layer).eval()
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(size, 3, 7, generator=generator) for _ in range(2)]
    store = extract(model, data, tmp_path / "s", "layer", types=nn.Module, progress=False)
    key = store.layers[0]
    with torch.no_grad():
        expected = torch.cat([model(x) for x in data])
    np.testing.assert_allclose(store.numpy(key), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert store[key].time_dim == -2
    np.testing.assert_allclose(
        torch.cat(list(store[key].frames(3, shuffle=False))).numpy(),
        expected.flatten(0, 1).numpy(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_valid_rows_of_a_time_first_layer_are_cut_on_its_time(tmp_path):
    torch.manual_seed(0)
    model = TimeFirst(nn.Linear(3, 5)).double()
    store = extract(
        model, batches(), tmp_path / "s", "layer", types=nn.Linear, inputs=given, lengths=lengths_of, progress=False
    )
    for row, sound in zip(store["layer"], sounds(), strict=True):
        close(row, (model.layer.weight @ sound + model.layer.bias[:, None]).T.detach().numpy())


def test_lengths_of_an_input_that_is_channels_last(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), Block(nn.Linear(5, 4))).double()

    def channels_last(rows):
        return (padded(rows).mT,), {}

    options = {"types": (nn.Linear, Block), "inputs": channels_last, "progress": False}
    store = extract(model, batches(), tmp_path / "s", ["0", "1"], lengths=lengths_of, time_dim=1, **options)
    with torch.no_grad():
        for number, sound in enumerate(sounds()):
            close(store["1"][number], model(sound.mT).numpy())
    whole = extract(model, batches(), tmp_path / "w", ["0", "1"], **options)
    # the linear layer contradicts that the last axis of the input is time, and so tells what it is in the block
    assert [whole[name].time_dim for name in whole.layers] == [-2, -2]
    assert "taken as time" not in repr(whole["1"])


def test_rows_of_a_keras_model_are_channels_last(tmp_path):
    keras = pytest.importorskip("keras", reason="keras comes with the test extra")
    inputs = keras.Input((None, 2))
    x = keras.layers.Conv1D(16, 3, padding="same", activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, keras.layers.ReLU(name="act")(keras.layers.BatchNormalization(name="norm")(x)))
    data = [torch.randn(3, length, 2) for length in (8, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = extract(model, data, tmp_path / "s", ["conv", "norm", "act"], types=keras.layers.Layer, progress=False)
        expected = [model(x).detach().cpu() for x in data]
    for name in ("conv", "norm", "act"):
        assert store[name].shape == (6, None, 16)
        assert store[name].time_dim == -2
    frames = torch.cat(list(store["act"].frames(5, shuffle=False)))
    np.testing.assert_allclose(
        frames.numpy(), torch.cat([y.flatten(0, 1) for y in expected]).numpy(), rtol=1e-5, atol=1e-6
    )
    data = store.dataset("act")
    _, outputs, lengths = data.collate([data[0], data[5]])
    assert outputs["act"].shape == (2, 8, 16)
    assert lengths["act"].tolist() == [8, 6]


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "whole batches"])
@pytest.mark.parametrize(
    ("reduce", "axes"),
    [
        (lambda t: t[..., :3] if t.shape[-1] != 5 else t[..., :3, :], (-1, -2)),
        (lambda t: t.mT, (-2, -1)),
        (lambda t: t.mean(-1), (None, -1)),
    ],
    ids=["some frames", "turned", "pooled"],
)
def test_what_reduce_leaves_of_the_axes_is_known(tmp_path, cut, reduce, axes):
    rows = [torch.randn(3, length, dtype=torch.float64) for length in (9, 7, 7)]
    data = [rows[:1], rows[1:]]
    stores = both(tmp_path, data=data, reduce=reduce, **({} if cut else {"lengths": None}))
    for store, axis in zip(stores, axes, strict=True):
        view = store["layer"]
        assert view.time_dim == axis
        assert "taken" not in repr(view)
        frames = torch.cat(list(view.frames(4, shuffle=False)))
        single = len(view.shape) == 2  # rows (C,) or (T,)
        rows = [
            (row[None] if axis is None else row[:, None]) if single else row.mT if axis == -1 else row for row in view
        ]
        close(frames, torch.cat(rows).numpy())


def test_a_reduced_row_whose_shape_tells_nothing_is_assumed_aloud(tmp_path):
    data = [torch.randn(2, 3, 9, dtype=torch.float64)]
    a, _ = both(tmp_path, data=data, reduce=lambda t: t[..., :5, :5], lengths=None, inputs=None)
    assert repr(a["layer"]) == "<layer: (2, 5, 5) float64, axis -1 taken as time>"


# -- what nobody says


def unsaid(path):
    """A store of rows whose axes nobody knows: the model takes no axis of its input that could be followed."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Block(nn.Identity())
            self.values = nn.Parameter(torch.arange(24.0).reshape(1, 4, 6))

        def forward(self, x):
            return self.layer(self.values.expand(len(x), 4, 6))

    return extract(Table(), [torch.zeros(2, 1, 8)] * 2, path, "layer", types=Block, progress=False)


def test_an_axis_that_nobody_says_is_assumed_aloud(tmp_path):
    store = unsaid(tmp_path / "s")
    view = store["layer"]
    assert repr(view) == "<layer: (4, 4, 6) float32, axis -1 taken as time>"
    assert "the time axis is unknown, so the last axis is used: layer" in str(store)
    with pytest.warns(
        UserWarning, match=r"the time axis of the rows of 'layer' is unknown, so axis -1 of \(4, 6\) is used"
    ):
        assert next(view.frames(100)).shape == (24, 4)
    data = store.dataset()
    with pytest.warns(UserWarning, match="the time axis of the rows of 'layer' is unknown"):
        assert data.collate([data[0], data[1]])[2]["layer"].tolist() == [6, 6]


@pytest.mark.parametrize("dim", [-2, 0])
def test_a_user_may_say_the_axis_when_reading(tmp_path, dim):
    store = unsaid(tmp_path / "s")
    assert next(store["layer"].frames(100, time_dim=dim)).shape == (16, 6)
    for given in (dim, {"layer": dim}):
        data = store.dataset(time_dim=given)
        assert data.collate([data[0], data[1]])[2]["layer"].tolist() == [4, 4]
    with pytest.raises(
        InvalidValue, match=r"time_dim=2 is not an axis of the rows of 'layer', whose shape is \(4, 6\)"
    ):
        store["layer"].frames(3, time_dim=2)
    with pytest.raises(InvalidValue, match="time_dim=-3 is not an axis"):
        store.dataset(time_dim=-3)
    with pytest.raises(TypeError, match="time_dim is a str"):
        store["layer"].frames(3, time_dim="-1")


def test_the_input_is_followed_once_and_only_where_types_say_nothing(tmp_path):
    ran = []

    class Counted(Around):
        def forward(self, x):
            ran.append(len(x))
            return super().forward(x)

    torch.manual_seed(1)
    model = Counted(First().double())
    data = [padded(rows) for rows in batches()]
    extract(model, data, tmp_path / "a", "layer.inner.layer", progress=False, stop=False)
    assert ran == [3, 3, 1]
    ran.clear()
    extract(model, data, tmp_path / "b", "layer", types=Block, progress=False, stop=False)
    assert ran == [3, 3, 3, 1]


def test_following_the_input_leaves_random_numbers_as_they_were(tmp_path):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    data = [torch.zeros(2, 1, 8)] * 2
    torch.manual_seed(0)
    store = extract(nn.Sequential(Noise()), data, tmp_path / "s", "0", types=Noise, progress=False)
    torch.manual_seed(0)
    close(store.numpy("0"), torch.cat([torch.rand(2, 1, 8), torch.rand(2, 1, 8)]).numpy())


def test_rows_that_differ_in_another_axis_than_the_time_are_refused(tmp_path):
    _, b = both(tmp_path)
    data = b.dataset()
    with pytest.raises(Unsupported, match=r"differ in more than their last axis: .* store\.dataset\(time_dim=-2\)"):
        b.dataset(time_dim=-1).collate([data[0], data[1]])


def test_a_store_is_not_gone_on_with_on_another_time_axis(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    data = [torch.randn(2, 6, 4), torch.randn(2, 6, 4)]
    extract(model, data, tmp_path / "s", types=nn.Linear, progress=False)
    with pytest.raises(StoreError, match="time_dim: None then, 1 now"):
        extract(model, data, tmp_path / "s", types=nn.Linear, time_dim=1, progress=False)
