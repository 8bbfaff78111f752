"""What extract stores: the values of a hand-written loop, whatever the data, the layers and the options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from convtap._dataset.extract import extract as extract_with_bar
from convtap._dataset.store import Store
from convtap._errors import (
    AmbiguousCall,
    ConvtapError,
    CoverageWarning,
    InvalidType,
    InvalidValue,
    LayerNotFound,
    NotCaptured,
    StoreError,
    Unsupported,
)
from tests.reference import cloning_hooks, same, snapshot_of


def extract(*args, **options):
    return extract_with_bar(*args, **{"progress": False, **options})


def two_convs():
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv1d(4, 6, 5, stride=2))


X = torch.randn(10, 1, 50, generator=torch.Generator().manual_seed(1))


def by_hand(model, batches, types=nn.Conv1d):
    """One dict of cloned outputs for each batch."""
    found = []
    for batch in batches:
        with cloning_hooks(model.eval(), types) as seen, torch.inference_mode():
            model(batch)
        found.append(dict(seen))
    return found


# -- data


def test_every_row_is_what_a_hook_that_clones_sees(tmp_path):
    model = two_convs()
    store = extract(model, TensorDataset(X), tmp_path, batch_size=4)
    reference = by_hand(model, X.split(4))
    assert store.ids == list(range(10))
    for layer in ("0", "2"):
        assert torch.equal(torch.stack(list(store[layer])), torch.cat([batch[layer] for batch in reference]))
    assert store["0"].shape == (10, 4, 48)


def test_the_model_stays_as_it_was(tmp_path):
    model = two_convs().train()
    model[1].eval()
    before, modes = snapshot_of(model), [module.training for module in model.modules()]
    extract(model, TensorDataset(X), tmp_path)
    assert snapshot_of(model) == before
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_mode_is_set_for_the_run(mode, tmp_path):
    class Mode(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            assert torch.is_inference_mode_enabled()
            return self.conv(x * 0 + self.training)

    model = Mode()
    store = extract(model, TensorDataset(X), tmp_path, mode=mode)
    expected = model.conv.weight.item() * (mode == "train") + model.conv.bias.item()
    torch.testing.assert_close(store["conv"][3], torch.full((1, 50), expected))


class Hugging:
    """A map-style data set that is no torch Dataset, as of the datasets package."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return X[i]


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(X),
        Hugging(),
        DataLoader(TensorDataset(X), batch_size=4),
        DataLoader(TensorDataset(X), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(X), batch_size=4, drop_last=True),
        DataLoader(TensorDataset(X), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        DataLoader(TensorDataset(X), batch_size=4, sampler=SubsetRandomSampler(range(10))),
        DataLoader(TensorDataset(X), batch_size=4, num_workers=1),
    ],
    ids=["dataset", "duck", "loader", "shuffled", "drop_last", "batch_sampler", "random subset", "workers"],
)
def test_a_data_set_is_read_in_its_own_order_whole(data, tmp_path):
    model = two_convs()
    store = extract(model, data, tmp_path, **({} if isinstance(data, DataLoader) else {"batch_size": 4}))
    assert store.ids == list(range(10))
    reference = torch.cat([batch["2"] for batch in by_hand(model, X.split(4))])
    assert torch.equal(torch.from_numpy(store.numpy("2")), reference)


class Shuffled(BatchSampler):
    """Shuffles whole batches."""

    def __iter__(self):
        batches = list(super().__iter__())
        return (batches[i] for i in torch.randperm(len(batches)).tolist())


def test_a_batch_sampler_keeps_its_batches_and_a_sampler_its_order(tmp_path):
    data, model = TensorDataset(X), two_convs()
    store = extract(model, DataLoader(data, batch_sampler=[[7, 2], [0, 9, 4]]), tmp_path / "a")
    assert store.ids == [7, 2, 0, 9, 4]
    reference = by_hand(model, [X[[7, 2]], X[[0, 9, 4]]])
    assert torch.equal(store["2"][9], reference[1]["2"][1])
    assert extract(model, DataLoader(data, sampler=[5, 1, 3], batch_size=2), tmp_path / "b").ids == [5, 1, 3]
    assert extract(model, DataLoader(Subset(data, [5, 1]), batch_size=2), tmp_path / "c").ids == [0, 1]
    shuffled = DataLoader(data, batch_sampler=Shuffled(SequentialSampler(data), 4, False))
    assert extract(model, shuffled, tmp_path / "d").ids == list(range(10))
    assert extract(model, shuffled, tmp_path / "d").missing == []


def test_batches_that_are_others_each_time_or_samples_twice_are_refused(tmp_path):
    data, model = TensorDataset(X), two_convs()
    mixed = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False))
    assert extract(model, mixed, tmp_path / "plain").ids == list(range(10))

    class Mixed(BatchSampler):
        pass

    with pytest.raises(InvalidValue, match="the Mixed makes other batches each time it is read.*Fix its seed"):
        extract(model, DataLoader(data, batch_sampler=Mixed(RandomSampler(data), 4, False)), tmp_path)
    weighted = WeightedRandomSampler([1.0] * 10, 10)
    with pytest.raises(InvalidValue, match="the WeightedRandomSampler draws other samples each time"):
        extract(model, DataLoader(data, sampler=weighted), tmp_path)
    with pytest.raises(InvalidValue, match="sample 3 is in the data loader's batches more than once"):
        extract(model, DataLoader(data, batch_sampler=[[1, 3], [3]]), tmp_path)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: list(X.split(4)),
        lambda: (batch for batch in X.split(4)),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(list(X.split(4)), batch_size=None),
    ],
    ids=["list", "generator", "stream loader", "unbatched loader"],
)
def test_an_iterable_of_batches_is_counted(make, tmp_path):
    model = two_convs()
    store = extract(model, make(), tmp_path, shard_bytes=1)
    assert store.ids == list(range(10))
    assert store.missing == []
    (tmp_path / "rank-00000" / "shard-000001.safetensors").unlink()
    (tmp_path / "rank-00000" / "finished.json").unlink()
    if isinstance(make(), list):
        assert Store(tmp_path).missing == [1]
    else:
        assert Store(tmp_path).missing is None
        assert "has not reached the end of its data" in repr(Store(tmp_path))
    store = extract(model, make(), tmp_path)
    assert store.ids == list(range(10))
    assert torch.equal(store["2"][5], by_hand(model, X.split(4))[1]["2"][1])


def test_a_stream_of_samples_is_batched(tmp_path):
    assert extract(two_convs(), Stream(), tmp_path, batch_size=4).ids == list(range(10))


def test_ids_are_what_the_function_returns(tmp_path):
    data = [{"audio": X[:4], "name": list("abcd")}, {"audio": X[4:6], "name": ["e", "é/../x"]}]
    store = extract(
        two_convs(), data, tmp_path, inputs=lambda batch: ((batch["audio"],), {}), ids=lambda batch: batch["name"]
    )
    assert store.ids == [*"abcde", "é/../x"]
    assert torch.equal(store["0"]["é/../x"], store["0"][5:6][0])
    assert torch.equal(store["0"]["c"], store["0"][2:3][0])
    assert [path.name for path in tmp_path.rglob("*é*")] == []


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (lambda batch: [1, 1], InvalidValue, "the id 1 occurs twice"),
        (lambda batch: ["a", 1], InvalidType, "returned 1 among ids of type str"),
        (
            lambda batch: ["a\udce9.wav", "b"],
            InvalidType,
            r"returned the id 'a\\udce9.wav'. Return an int or a str \(in UTF-8",
        ),
        (lambda batch: [0.5, 1], InvalidType, "returned the id 0.5. Return an int or a str"),
        (lambda batch: "ab", InvalidType, "returned 'ab', not a list. Return one int or str for each sample"),
        (
            lambda batch: [1, 2, 3],
            Unsupported,
            r"rows of layer '0' are not the samples: axis 0 of \(2, 4, 48\) is 2, but the batch has 3",
        ),
    ],
)
def test_ids_that_cannot_be_used(ids, error, message, tmp_path):
    with pytest.raises(error, match=message):
        extract(two_convs(), list(X.split(2)), tmp_path, ids=ids)


def test_an_id_of_an_earlier_batch_or_run_is_known(tmp_path):
    model = two_convs()
    for _ in range(2):
        with pytest.raises(InvalidValue, match="the id 7 occurs twice"):
            extract(model, list(X.split(1)), tmp_path, ids=lambda batch: [7])
    assert Store(tmp_path).ids == [7]


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (TensorDataset(X[:0]), {}, InvalidValue, "the data has length 0"),
        ([], {}, InvalidValue, "the data has length 0"),
        (X, {}, InvalidType, r"data is a Tensor.*TensorDataset\(x\)"),
        ({"x": X}, {}, InvalidType, "data is a dict"),
        (5, {}, InvalidType, "data is a int"),
        ([X], {"batch_size": 2}, InvalidValue, "do not apply to a list, which is an iterable of batches"),
        (
            DataLoader(TensorDataset(X)),
            {"batch_size": 2},
            InvalidValue,
            "do not apply to a DataLoader, which has its own",
        ),
        (TensorDataset(X), {"batch_size": 0}, InvalidValue, "batch_size=0 is not a positive int"),
        ([5], {}, InvalidType, "a batch is a int"),
        ([X], {"inputs": lambda batch: batch}, InvalidType, r"inputs\(batch\) returned a Tensor.*\(args, kwargs\)"),
        ([X], {"inputs": 3}, InvalidType, "inputs is a int, not a function"),
        ([X], {"calls": "all"}, InvalidValue, "calls='all' is invalid. Pass one of 'error', 'cat', 'keys'"),
        ([X], {"mode": "test"}, InvalidValue, "mode='test' is invalid. Pass one of 'eval', 'train'"),
        ([X], {"reduce": 3}, InvalidType, "reduce is a int"),
        ([X], {"layers": "1.conv"}, LayerNotFound, "no layer is named '1.conv'"),
        ([X], {"shard_bytes": "many"}, InvalidValue, "shard_bytes='many'"),
        ([X], {"device": "nowhere"}, InvalidValue, "device='nowhere' is not a device"),
        ([X], {"device": "meta"}, InvalidValue, "device='meta', but the model is on 'cpu'"),
        ([X], {"autocast": True}, InvalidType, "autocast=True is not a dtype"),
        ([X], {"part": (2, 2)}, InvalidValue, r"part=\(2, 2\) is not \(i, n\)"),
        ([X], {"part": (0, 2)}, InvalidValue, "part 0 of 2 of an iterable cannot count.*ids="),
        (
            [X],
            {"labels": lambda batch: ["a"] * 10},
            InvalidType,
            r"labels\(batch\) returned a list, which is not a tensor",
        ),
        ([X], {"labels": lambda batch: [1]}, InvalidValue, r"labels\(batch\) returned shape \(1,\) for 10 samples"),
    ],
)
def test_bad_input_is_named(data, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        extract(two_convs(), data, tmp_path / "s", **options)


# -- layers and values


def test_each_pass_runs_to_its_end_unless_stop_asks_otherwise(tmp_path):
    model, ran = two_convs(), []
    model.append(nn.Tanh())
    model[3].register_forward_hook(lambda *args: ran.append(1))
    whole = extract(model, TensorDataset(X), tmp_path / "a", "0", batch_size=2)
    assert whole.layers == ["0"]
    assert len(ran) == 5
    ran.clear()
    ended = extract(model, TensorDataset(X), tmp_path / "b", "0", batch_size=2, stop=True)
    assert not ran
    assert all(same(ended["0"][i], whole["0"][i]) for i in range(10))


class Streaming(nn.Module):
    """Puts the end of the last batch before the next one; ``plain`` keeps it in an attribute, not in a buffer."""

    def __init__(self, plain):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Conv1d(2, 1, 1)
        context = torch.zeros(2, 1, 2)
        if plain:
            self.context = context
        else:
            self.register_buffer("context", context)

    def forward(self, x):
        y = self.head(self.conv(torch.cat([self.context, x], -1)))
        self.context = x[..., -2:].clone()
        return y


@pytest.mark.parametrize("plain", [False, True], ids=["buffer", "attribute"])
@pytest.mark.parametrize("layers", ["conv", "head", None])
def test_a_model_that_keeps_state_gives_the_rows_of_a_plain_loop(plain, layers, tmp_path):
    model = Streaming(plain)
    store = extract(model, TensorDataset(X), tmp_path, layers, batch_size=2)
    context = torch.zeros(2, 1, 2)
    for start in range(0, 10, 2):
        batch = X[start : start + 2]
        conv = F.conv1d(torch.cat([context, batch], -1), model.conv.weight, model.conv.bias)
        expected = {"conv": conv, "head": F.conv1d(conv, model.head.weight, model.head.bias)}
        context = batch[..., -2:]
        for layer in store.layers:
            assert torch.equal(torch.stack(store[layer][start : start + 2]), expected[layer])


@pytest.mark.parametrize("plain", [False, True], ids=["buffer", "attribute"])
def test_a_model_that_keeps_state_is_named_where_a_run_leaves_batches_out(plain, tmp_path, recwarn):
    extract(Streaming(plain), TensorDataset(X), tmp_path / "whole", batch_size=2)
    extract(two_convs(), TensorDataset(X), tmp_path / "stateless", batch_size=2, part=(1, 2))
    assert not recwarn.list
    with pytest.warns(CoverageWarning, match=r"keeps state from batch to batch \(\(root\)\.context changed"):
        extract(Streaming(plain), TensorDataset(X), tmp_path / "part", batch_size=2, part=(1, 2))


def test_a_cache_that_is_filled_once_is_no_state(tmp_path, recwarn):
    class Caches(nn.Module):
        cache = None

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            if self.cache is None or self.cache.shape[-1] < x.shape[-1]:
                self.cache = torch.arange(x.shape[-1])
            return self.conv(x + self.cache[: x.shape[-1]])

    data = [(X[:2, :, : 50 - number % 2], [2 * number, 2 * number + 1]) for number in range(6)]
    extract(Caches(), data, tmp_path / "cache", ids=lambda batch: batch[1], part=(1, 2))
    trained = nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1))
    extract(trained, TensorDataset(X), tmp_path / "train", mode="train", batch_size=2, part=(1, 2))
    assert not recwarn.list


def test_a_layer_that_runs_twice_in_a_later_batch_only_is_seen(tmp_path):
    model = Repeats(lambda x: 1 + (x.mean().item() > 3.5))
    batches = [torch.full((2, 1, 8), float(value)) for value in range(6)]  # of one shape: 4 and 5 run "conv" twice
    with pytest.raises(Unsupported, match="layer 'conv' ran 2 times in one forward pass"):
        extract(model, batches, tmp_path / "error", "conv", shard_bytes=1)
    assert Store(tmp_path / "error").missing == [4, 5]
    store = extract(model, batches, tmp_path / "keys", "conv", calls="keys")
    assert store.layers == ["conv#0", "conv#1"]
    assert store["conv#1"].ids == [8, 9, 10, 11]
    with torch.inference_mode():
        second = model.conv(F.relu(model.conv(batches[5])))
    assert torch.equal(store["conv#1"][10], second[0])


def test_stop_loses_later_calls_of_the_layers(tmp_path):
    model = Repeats(lambda x: 2)
    store = extract(model, [X], tmp_path / "a", "conv", stop=True)
    with torch.inference_mode():
        assert torch.equal(store["conv"][3], model.conv(X)[3])
    with pytest.raises(Unsupported, match="layer 'conv' ran 2 times"):  # before "last", which ends the pass
        extract(model, [X], tmp_path / "b", ["conv", "last"], stop=True)


def test_stop_needs_layers_and_a_pass_that_can_be_ended(tmp_path):
    model = two_convs()
    with pytest.raises(InvalidValue, match="stop=True needs layers"):
        extract(model, [X], tmp_path / "a", stop=True)
    with pytest.raises(InvalidValue, match="stop=True cannot end a compiled forward pass"):
        extract(model, [X], tmp_path / "b", "0", stop=True, compile=True)
    with pytest.raises(Unsupported, match="stop=True does not work for layers inside TorchScript"):
        extract(torch.jit.script(model), [X], tmp_path / "c", "0", stop=True)
    with pytest.raises(InvalidValue, match="stop='no' is invalid. Pass one of True, False"):
        extract(model, [X], tmp_path / "d", "0", stop="no")


def test_passes_that_end_early_and_whole_ones_do_not_meet_in_one_store(tmp_path):
    model = two_convs()
    extract(model, [X], tmp_path, "0", stop=True)
    with pytest.raises(StoreError, match="stop: True then, False now"):
        extract(model, [X], tmp_path, "0")


class Repeats(nn.Module):
    """Runs one convolution ``times(x)`` times."""

    def __init__(self, times=lambda x: 3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.last = nn.Conv1d(1, 2, 1)
        self.times = times

    def forward(self, x):
        for _ in range(self.times(x)):
            x = F.relu_(self.conv(x))
        return self.last(x)


def test_a_layer_that_runs_several_times_is_an_error_or_joined_or_numbered(tmp_path):
    model = Repeats()
    with cloning_hooks(model) as seen, torch.inference_mode():
        model(X)
    first, second, third = [output for name, output in seen if name == "conv"]
    with pytest.raises(
        Unsupported, match=r"layer 'conv' ran 3 times in one forward pass\. Pass calls='cat'.*calls='keys'"
    ):
        extract(model, [X], tmp_path / "error")
    store = extract(model, [X], tmp_path / "cat", calls="cat")
    assert torch.equal(torch.stack(list(store["conv"])), torch.cat([first, second, third], -1))
    store = extract(model, [X], tmp_path / "keys", calls="keys")
    assert store.layers == ["conv#0", "conv#1", "conv#2", "last"]
    assert torch.equal(torch.stack(list(store["conv#1"])), second)
    with pytest.raises(AmbiguousCall, match=r"'conv' ran several times.*conv#0, conv#1, conv#2\. Read one"):
        store["conv"]
    assert store["last"].shape == (10, 2, 50)


def test_a_layer_that_ran_in_some_batches_only_is_absent_for_the_others(tmp_path):
    model = Repeats(lambda x: int(x.sum() > 0))
    signs = torch.tensor([1.0, 1, -1, 1, -1])
    batches = [torch.full((2, 1, 8), sign.item()) for sign in signs]
    store = extract(model, batches, tmp_path, shard_bytes=150)
    view = store["conv"]
    assert view.ids == [0, 1, 2, 3, 6, 7]
    assert view.absent == [4, 5, 8, 9]
    assert len(view) == len(list(view)) == 6
    assert torch.equal(view[4:5][0], view[6])
    with pytest.raises(NotCaptured, match="layer 'conv' did not run for the sample 5, only for 6 of 10 samples"):
        view[5]
    assert set(store.sample(5)) == {"last"}
    assert set(store.sample(6)) == {"conv", "last"}
    assert "absent for 4 samples" in repr(view)
    with pytest.raises(Unsupported, match=r"did not run for 4 samples of 10 \(4, 5, 8, …"):
        view.numpy()
    assert [id for id, _ in (store.dataset("conv")[i] for i in range(6))] == view.ids
    assert torch.equal(store["last"][5], model.eval()(batches[2])[1])


def test_a_layer_that_never_runs_is_an_error_alone_and_a_warning_beside_others(tmp_path):
    model = Repeats(lambda x: 0)
    with pytest.raises(NotCaptured, match="nothing was captured"):
        extract(model, [X], tmp_path / "a", "conv")
    with pytest.warns(CoverageWarning, match="1 selected layer did not run in any batch.*conv"):
        store = extract(model, [X], tmp_path / "b", ["conv", "last"])
    assert store.layers == ["last"]
    assert "did not run" in repr(store)
    with pytest.raises(LayerNotFound, match="'conv' was selected, but did not run for any sample"):
        store["conv"]


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)
        self.heads = nn.ModuleDict({"0": nn.Conv1d(3, 2, 1)})

    def forward(self, x):
        hidden, _ = self.lstm(x.transpose(1, 2))
        return self.heads["0"](hidden.transpose(1, 2))


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 1)

    def forward(self, x):
        return {"out": self.conv(x), "parts": (x, None)}


def test_structures_of_tensors_keep_their_structure_in_the_names(tmp_path):
    model = nn.Sequential(Dicts())
    store = extract(model, [X], tmp_path, types=Dicts)
    assert store.layers == ["0[out]", "0[parts][0]"]
    assert torch.equal(torch.stack(list(store["0[parts][0]"])), X)
    with pytest.raises(LayerNotFound, match=r"'0' returned a structure.*0\[out\], 0\[parts\]\[0\]"):
        store["0"]


def test_a_sample_axis_that_does_not_match_names_the_layer_and_both_numbers(tmp_path):
    model = Structured()
    with pytest.raises(
        Unsupported, match=r"'lstm\[1\]\[0\]' are not the samples: axis 0 of \(1, 10, 3\) is 1, but the batch has 10"
    ):
        extract(model, [X], tmp_path / "a", types=nn.LSTM)
    folded = nn.Sequential(nn.Unflatten(2, (2, 25)), nn.Flatten(0, 2), nn.Unflatten(1, (1, 25)), nn.Conv1d(1, 3, 3))
    with pytest.raises(Unsupported, match=r"rows of layer '3' are not the samples: axis 0 of \(10, 3, 23\) is 10"):
        extract(folded, [X[:5]], tmp_path / "b")


class GivesObject(nn.Module):
    def forward(self, x):
        self.seen = x
        return object()


class HoldsObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.object = nn.Conv1d(1, 1, 1), GivesObject()

    def forward(self, x):
        self.object(x)
        return self.conv(x)


def test_an_output_that_is_no_tensor_is_named(tmp_path):
    with pytest.raises(Unsupported, match="the output 'object' is a object, but a store holds tensors"):
        extract(HoldsObject(), [X], tmp_path, types=(nn.Conv1d, GivesObject))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float64],
    ids=str,
)
def test_dtypes_are_stored_without_losing_a_bit(dtype, tmp_path):
    conv = nn.Conv1d(1, 3, 3)
    store = extract(nn.Sequential(conv), list(X.split(4)), tmp_path, dtype=dtype)
    with torch.inference_mode():
        expected = torch.cat([conv(batch) for batch in X.split(4)]).to(dtype)
    read = torch.stack(list(store["0"]))
    assert read.dtype == store["0"].dtype == dtype
    assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8))
    assert np.array_equal(store.numpy("0"), expected.double().numpy())


@pytest.mark.parametrize(
    "reduce",
    [
        lambda t: torch.complex(t, t.flip(-1)),
        lambda t: t.long(),
        lambda t: t > 0,
        lambda t: t.sum((1, 2)),
        lambda t: t[:, :, :0],
        lambda t: t.transpose(1, 2),
        lambda t: t.expand(10, 4, 48),
        lambda t: torch.where(t > 0, torch.nan, -torch.inf),
    ],
    ids=["complex", "int", "bool", "scalars", "empty", "transposed", "view", "nan"],
)
def test_whatever_reduce_returns_comes_back(reduce, tmp_path):
    model = two_convs()
    store = extract(model, [X], tmp_path, "0", reduce=reduce)
    expected = reduce(by_hand(model, [X])[0]["0"])
    assert all(same(store["0"][i], expected[i]) for i in range(10))
    assert same(torch.from_numpy(store.numpy("0")), expected.contiguous())


def test_reduce_that_fails_names_the_layer(tmp_path):
    with pytest.raises(ConvtapError, match=r"layer '0': reduce failed on the output of shape \(10, 4, 48\)"):
        extract(two_convs(), [X], tmp_path, reduce=lambda t: t[99])
    with pytest.raises(ConvtapError, match=r"layer '0': reduce failed on a row of shape \(4, 48\): ValueError: no"):
        extract(two_convs(), [X], tmp_path, reduce=raises, lengths=lambda batch: [50] * 10)


def raises(tensor):
    raise ValueError("no")


def by_layer(mapping, path, net=None, **options):
    return extract(net or two_convs(), [X], path, reduce=mapping, **options)


@pytest.mark.parametrize("lengths", [None, lambda batch: [50] * 10], ids=["batch", "lengths"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_reduce_by_layer_leaves_the_others_as_they_are(lengths, compiled, tmp_path):
    model = two_convs()
    reference = by_hand(model, [X])[0]
    options = {"lengths": lengths, "compile": compiled, "calls": "keys"}
    store = by_layer({"2": lambda t: t.mean(-1)}, tmp_path, model, **options)
    torch.testing.assert_close(torch.stack(list(store["2"])), reference["2"].mean(-1))
    torch.testing.assert_close(torch.stack(list(store["0"])), reference["0"])


def test_reduce_by_glob_and_a_layers_own_name_comes_first(tmp_path):
    model = nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(3)))
    functions = {"*": lambda t: t[..., :1], "1": lambda t: t[..., :2], "[12]": lambda t: t[..., :3]}
    store = by_layer(functions, tmp_path, model)
    assert {name: store[name].shape[-1] for name in store.layers} == {"0": 1, "1": 2, "2": 1}
    with pytest.raises(StoreError, match=r"reduce of '1': the code of .*lambda.* has changed"):
        by_layer({**functions, "1": lambda t: t[..., :4]}, tmp_path, model)
    with pytest.raises(StoreError, match=r"reduce: one for each of \*, 1, \[12\] then, none now"):
        by_layer(None, tmp_path, model)
    assert by_layer(functions, tmp_path, model).missing == []


def test_reduce_by_layer_reaches_parts_functions_and_wrapped_layers(tmp_path):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(2, 1, 3))
            self.block = Dicts()

        def forward(self, x):
            return F.conv1d(x, self.kernel), self.block(x)

    net = nn.DataParallel(Functional())
    functions = {"kernel": lambda t: t[..., :1], "module.block[out]": lambda t: t[..., :2]}
    store = by_layer(functions, tmp_path / "a", net, layers=["kernel", "block[out]", "block[parts]"])
    assert {name: store[name].shape[-1] for name in store.layers} == {
        "kernel": 1,
        "block[out]": 2,
        "block[parts][0]": 50,
    }
    store = by_layer({"block": lambda t: t[..., :4]}, tmp_path / "b", net, layers=["block[out]"])
    assert store["block[out]"].shape == (10, 2, 4)


@pytest.mark.parametrize("lengths", [None, lambda batch: [50] * 10], ids=["batch", "lengths"])
@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        (
            {"22": torch.abs},
            LayerNotFound,
            r"reduce has an entry for '22', but it matches none of the selected layers: 0, 2\..*Did you",
        ),
        ({"1": torch.abs}, LayerNotFound, "reduce has an entry for '1'"),
        ({"conv*": torch.abs, "0": torch.abs}, LayerNotFound, r"reduce has an entry for 'conv\*'"),
        ({"0[1]": torch.abs}, LayerNotFound, r"reduce has an entry for '0\[1\]'"),
        ({"0": 3}, InvalidType, "reduce has the entry '0': int, but it must map names of layers"),
        ({0: torch.abs}, InvalidType, "reduce has the entry 0: builtin"),
    ],
)
def test_an_entry_of_reduce_that_means_nothing_is_an_error(mapping, error, message, lengths, tmp_path):
    with pytest.raises(error, match=message):
        by_layer(mapping, tmp_path, lengths=lengths)
    assert not (tmp_path / "store.json").exists()


def test_a_layer_that_changes_its_dtype_between_batches_is_named(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 1, 1))
    batches = [X[:2], X[:2]]
    dtypes = iter([torch.float32, torch.float64])
    with pytest.raises(Unsupported, match=r"outputs of layer '0' have several dtypes.*torch\.float32, torch\.float64"):
        extract(model, batches, tmp_path, reduce=lambda t: t.to(next(dtypes)), reduce_id="r")


def test_autocast_runs_the_model_in_that_dtype(tmp_path):
    model = two_convs().eval()
    store = extract(model, [X], tmp_path, autocast=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), cloning_hooks(model) as seen:
        model(X)
    assert torch.equal(torch.stack(list(store["2"])), dict(seen)["2"])
    assert store["2"].dtype == torch.bfloat16


def test_inputs_of_layers_can_be_stored(tmp_path):
    model = two_convs().eval()
    store = extract(model, [X], tmp_path, at="input")
    with torch.inference_mode():
        assert torch.equal(torch.stack(list(store["2"])), model[:2](X))


def test_keywords_reach_the_model(tmp_path):
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, *, x, scale):
            return self.conv(x * scale[:, None, None])

    model, scale = Keywords(), torch.arange(10.0)
    data = StackDataset(x=X, scale=scale)
    store = extract(model, data, tmp_path, batch_size=5)
    with torch.inference_mode():
        for i in (0, 7):
            start = i // 5 * 5
            batch = model.conv(X[start : start + 5] * scale[start : start + 5, None, None])
            assert torch.equal(store["conv"][i], batch[i - start])


def test_convolutions_called_as_functions_are_stored_too(tmp_path):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(2, 1, 3))

        def forward(self, x):
            return F.conv1d(x, self.kernel)

    model = Functional()
    store = extract(model, [X], tmp_path)
    assert torch.equal(store["kernel"][4], F.conv1d(X, model.kernel)[4])


def test_a_bypassed_layer_is_an_error(tmp_path):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)
            self.other = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            return self.other(x) + (x.unfold(-1, 3, 1) * self.conv.weight.squeeze(1)).sum(-1).mean()

    with pytest.raises(NotCaptured, match="conv"):
        extract(Fused(), [X], tmp_path)


def test_labels_are_stored_with_their_samples(tmp_path):
    labels = torch.arange(10) * 3
    loader = DataLoader(TensorDataset(X, labels), batch_size=4)
    store = extract(two_convs(), loader, tmp_path, labels=lambda batch: batch[1], shard_bytes=1000)
    found = [(id, label.item()) for id, _, label in (store.dataset("2")[i] for i in range(10))]
    assert found == [(i, 3 * i) for i in range(10)]


def test_compiled_the_same_layers_are_stored_and_nothing_stays_on_the_model(tmp_path):
    model = Repeats()
    before = snapshot_of(model)
    batches = list(X.split(5))
    store = extract(model, batches, tmp_path / "a", compile=True, calls="keys")
    eager = extract(model, batches, tmp_path / "b", calls="keys")
    assert store.layers == eager.layers == ["conv#0", "conv#1", "conv#2", "last"]
    for layer in store.layers:
        torch.testing.assert_close(torch.stack(list(store[layer])), torch.stack(list(eager[layer])))
    assert snapshot_of(model) == before


@pytest.mark.parametrize(
    "scripted", [torch.jit.script, lambda model: torch.jit.trace(model, X[:2])], ids=["script", "trace"]
)
def test_scripted_models_are_extracted_as_a_whole_and_in_part(scripted, tmp_path):
    model = two_convs().eval()
    reference = torch.cat([batch["2"] for batch in by_hand(model, X.split(4))])
    for layer, net in (("2", scripted(model)), ("0.2", nn.Sequential(scripted(model), nn.Conv1d(6, 2, 1)))):
        store = extract(net, list(X.split(4)), tmp_path / layer, layer)
        assert torch.equal(torch.stack(list(store[layer])), reference)


def test_uninitialized_parameters_are_named(tmp_path):
    with pytest.raises(Unsupported, match=r"0\.weight of a lazy module is not initialized yet"):
        extract(nn.Sequential(nn.LazyConv1d(2, 3)), [X], tmp_path)


def test_nothing_is_pickled_and_any_safetensors_reader_reads_a_shard(tmp_path):
    from safetensors import safe_open

    model = two_convs()
    store = extract(model, [X[:6], X[6:, :, :40]], tmp_path, ["0"])
    with safe_open(tmp_path / "rank-00000" / "shard-000000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("ids"), torch.arange(10))
        offsets, shapes = file.get_tensor("offsets:0"), file.get_tensor("shapes:0")
        row = file.get_tensor("layer:0")[offsets[7] : offsets[8]].view(*shapes[7].tolist())
    assert torch.equal(row, model[0](X[6:, :, :40])[1])
    assert torch.equal(store["0"][7], row)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors") or path.name == ".lock"


def test_the_bar_shows_samples_bytes_and_the_forecast(tmp_path, capfd):
    extract(two_convs(), TensorDataset(X), tmp_path / "store", batch_size=2, shard_bytes=2000, progress=True)
    err = capfd.readouterr().err
    assert "extract -> store" in err
    assert "10/10" in err
    assert "samples/s" in err
    assert "KiB of about 12.7 KiB written" in err  # 10 samples of (4 x 48 + 6 x 22) x 4 bytes are 12.66 KiB


def test_a_store_error_is_raised_before_the_model_runs(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(StoreError, match="is not a store, but holds x"):
        extract(two_convs(), [5], tmp_path)


def test_what_comes_after_the_activation_is_extracted_as_well(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv1d(4, 2, 3)).eval()
    x = torch.randn(6, 1, 20)
    store = extract(model, TensorDataset(x), tmp_path / "a", at="activation", batch_size=3)
    with torch.no_grad():
        expected = torch.cat([nn.Conv1d.forward(model[0], x[i : i + 3]).relu() for i in (0, 3)])
    assert torch.equal(torch.stack([store["0"][i] for i in range(6)]), expected)
    with pytest.raises(
        LayerNotFound, match="'2' was selected, but did not run for any sample .or, with at='activation'"
    ):
        store["2"]


def test_the_calls_of_a_layer_and_a_layer_named_like_a_call_have_keys_of_their_own(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(2, 2, 1)
            self.add_module("a#0", nn.Conv1d(2, 2, 1))

        def forward(self, x):
            return self.get_submodule("a#0")(self.a(self.a(x)))

    model, x = Named(), torch.randn(3, 2, 5)
    store = extract(model, [x], tmp_path / "s", calls="keys", progress=False)
    first = model.a(x)
    expected = {"a##0": first, "a##1": model.a(first), "a#0": model(x)}
    assert set(store.layers) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(store[key].numpy()), value.detach())
