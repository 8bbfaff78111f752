"""Padded batches: which frames are those of each sound alone, held against the model run on each sound alone."""

from __future__ import annotations

import random
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import CoverageWarning, Store, Unsupported, capture, extract, timeline
from tests.test_timeline import CroppedToItsInput, CutToAMultiple, DilatedTCN, FilledUp, Then, UNet

FULL = 60
LENGTHS = (60, 59, 55, 41, 33, 30)

# -- references


def prepared(model):
    """The model in float64 with positive random weights, so that no two differences cancel."""
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter) + 0.05
    return model


def batch_of(lengths, fill="noise"):
    x = torch.rand(len(lengths), 1, max(lengths), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if fill == "zeros":
        for row, length in zip(x, lengths, strict=True):
            row[:, length:] = 0
    return x


def alone(model, x, layer):
    """What a layer gives for one input in a pass of its own."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0][0]


def differing(model, x, lengths, layer, rows, axis=-1):
    """How many of the last frames of some row are not those of the sound alone: from the first that differs on."""
    most = 0
    for row, (length, found) in enumerate(zip(lengths, rows, strict=True)):
        one = alone(model, x[row : row + 1, :, :length], layer)
        assert found.shape == one.shape
        frames = list(zip(found.movedim(axis, 0), one.movedim(axis, 0), strict=True))
        wrong = [t for t, (a, b) in enumerate(frames) if not torch.allclose(a, b, rtol=1e-9, atol=0)]
        most = max(most, len(frames) - wrong[0] if wrong else 0)
    return most


def claimed(messages, layer):
    """What the warnings say of a layer: 0 for nothing, a number of frames, or ``"every"``."""
    texts = [str(one.message) for one in messages if issubclass(one.category, CoverageWarning)]
    assert len(texts) <= 1  # one warning a call
    found = re.search(rf": (?:the last (\d+ )?frames?|(every) frame) of [^:]*'{re.escape(layer)}'", " ".join(texts))
    if found is None:
        return 0
    return found[2] or int(found[1] or 1)


def samples_of(model, layer, lengths, fill):
    """The rows of a layer, cut to the sounds' lengths, and what was said about them."""
    x = batch_of(lengths, fill)
    times = timeline(model, torch.rand(1, 1, FULL, dtype=torch.float64))
    with torch.no_grad(), capture(model, layer) as acts:
        model(x)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        rows = acts.samples(lengths=lengths, timeline=times)
    return x, [next(iter(row.values())) for row in rows], claimed(messages, layer)


# -- models


class Over(nn.Module):
    """Something over (B, T, C) between two convolutions; the first one is padded or not."""

    def __init__(self, middle, padding=0):
        super().__init__()
        self.before, self.middle, self.behind = nn.Conv1d(1, 4, 3, padding=padding), middle, nn.Conv1d(4, 2, 1)

    def forward(self, x):
        y = self.middle(self.before(x).transpose(1, 2))
        return self.behind((y[0] if isinstance(y, tuple) else y).transpose(1, 2))


class Heads(nn.Module):
    def __init__(self, causal, weights):
        super().__init__()
        self.heads, self.causal, self.weights = nn.MultiheadAttention(4, 2, batch_first=True), causal, weights

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        return self.heads(x, x, x, attn_mask=mask, need_weights=self.weights)


def scaled(causal):
    return Then(lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=causal)[:, 0])


def queries_first(causal):
    def attend(x):
        scores = x @ x.transpose(1, 2)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ x

    return Then(attend)


def keys_first(causal):
    def attend(x):
        scores = x @ x.transpose(1, 2)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).tril(-1).bool(), -torch.inf)
        return (x.transpose(1, 2) @ scores.softmax(1)).transpose(1, 2)

    return Then(attend)


def between(function, kernel=1, channels=2):
    return nn.Sequential(nn.Conv1d(1, channels, 3), Then(function), nn.Conv1d(channels, 2, kernel))


CLEAN = {
    "valid": (nn.Sequential(nn.Conv1d(1, 2, 5, 2), nn.ReLU(), nn.Conv1d(2, 2, 3, 3)), "2"),
    "padded on the left": (
        nn.Sequential(
            nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(1, 2, 5), nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(2, 2, 5)
        ),
        "3",
    ),
    "pooling": (nn.Sequential(nn.Conv1d(1, 2, 3), nn.AvgPool1d(2, 2), nn.Conv1d(2, 2, 1)), "2"),
    "repetition": (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Upsample(scale_factor=3), nn.Conv1d(2, 2, 1)), "2"),
    "transposed": (nn.Sequential(nn.Conv1d(1, 2, 4, 4), nn.ConvTranspose1d(2, 2, 4, 4), nn.Conv1d(2, 2, 1)), "2"),
    "batch norm": (nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)), "2"),
    "layer norm over channels": (Over(nn.LayerNorm(4)), "behind"),
    "one-way lstm": (Over(nn.LSTM(4, 4, batch_first=True)), "behind"),
    "cumulative sum": (Over(Then(lambda x: x.cumsum(1))), "behind"),
    "causal heads": (Over(Heads(True, False)), "behind"),
    "causal heads with weights": (Over(Heads(True, True)), "behind"),
    "causal attention": (Over(scaled(True)), "behind"),
    "causal by hand": (Over(queries_first(True)), "behind"),
    "causal, keys first": (Over(keys_first(True)), "behind"),
    "cut to a multiple": (CutToAMultiple(), "out"),
    "constant in front": (between(lambda x: torch.cat([x.new_ones(len(x), 2, 2), x], -1)), "2"),
    "first frames in front": (between(lambda x: torch.cat([x[..., :2], x], -1)), "2"),
    "patches": (
        between(lambda x: x[..., : x.shape[-1] // 4 * 4].unflatten(-1, (-1, 4)).mean(-1)),
        "2",
    ),
    "a window that is fixed": (nn.Sequential(Then(lambda x: x[..., :40]), nn.Conv1d(1, 2, 3)), "1"),
}

NEAR_THE_END = {
    "same": (
        nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 2, 5, padding="same"), nn.Conv1d(2, 2, 7, padding=3)),
        "2",
    ),
    "strided": (nn.Sequential(nn.Conv1d(1, 2, 4, 2, 1), nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 5, 3, 2)), "2"),
    "valid, then same": (nn.Sequential(nn.Conv1d(1, 2, 10, 5), nn.Conv1d(2, 2, 3, padding=1)), "1"),
    "causal, but padded on both sides": (DilatedTCN(), "convs.2"),
    "unet": (UNet(), "dec1"),
    "cropped": (CroppedToItsInput(), "out"),
    "filled up": (FilledUp(), "out"),
    "linear upsampling": (
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d(2, 2, 1)),
        "2",
    ),
    "overlapping transposed": (nn.Sequential(nn.Conv1d(1, 2, 3), nn.ConvTranspose1d(2, 2, 4, 2, 1), nn.Conv1d(2, 2, 1)), "2"),
    "padded pooling": (nn.Sequential(nn.Conv1d(1, 2, 3), nn.AvgPool1d(3, 2, 1), nn.Conv1d(2, 2, 1)), "2"),
    "reflect": (nn.Sequential(nn.Conv1d(1, 2, 5, padding=2, padding_mode="reflect"), nn.Conv1d(2, 2, 1)), "1"),
    "replicate": (nn.Sequential(nn.Conv1d(1, 2, 5, padding=2, padding_mode="replicate"), nn.Conv1d(2, 2, 1)), "1"),
    "one-way gru after same": (Over(nn.GRU(4, 4, batch_first=True), padding=1), "behind"),
    "causal attention after same": (Over(scaled(True), padding=1), "behind"),
    "causal, keys first, after same": (Over(keys_first(True), padding=1), "behind"),
    "last frame again": (between(lambda x: torch.cat([x, x[..., -1:]], -1)), "2"),
    "constant behind": (between(lambda x: torch.cat([x, x.new_ones(len(x), 2, 2)], -1)), "2"),
    "rolled to the left": (between(lambda x: x.roll(-2, -1)), "2"),
    "frames before a padded layer": (
        nn.Sequential(Then(lambda x: x[:, 0].unfold(-1, 8, 4).mT), nn.Conv1d(8, 2, 1), nn.Conv1d(2, 2, 3, padding=1)),
        "2",
    ),
    "chunks": (
        between(lambda x: torch.cat([F.avg_pool1d(chunk, 3, 1, 1) for chunk in x.split(20, -1)], -1)),
        "2",
    ),
    "a trimmed end before a padded layer": (
        nn.Sequential(Then(lambda x: x[..., : x.shape[-1] - 10]), nn.Conv1d(1, 2, 3, padding=1)),
        "1",
    ),
}  # fmt: skip
NEAR_THE_END["overlap-add"] = (
    nn.Sequential(
        nn.Conv1d(1, 8, 3),
        Then(lambda x: F.fold(x, (1, (x.shape[-1] - 1) * 2 + 4), (1, 4), stride=(1, 2))[:, :, 0]),
        nn.Conv1d(2, 2, 1),
    ),
    "2",
)

EVERY = {
    "group norm": (nn.Sequential(nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)), "2", "group_norm in '1'"),
    "instance norm": (nn.Sequential(nn.Conv1d(1, 4, 3), nn.InstanceNorm1d(4), nn.Conv1d(4, 2, 1)), "2", "batch_norm in '1'"),
    "layer norm over time": (between(lambda x: F.layer_norm(x, x.shape[1:])), "2", "layer_norm in '1'"),
    "softmax over time": (between(lambda x: x * x.softmax(-1)), "2", "softmax in '1'"),
    "mean over time": (between(lambda x: x * x.mean(-1, keepdim=True)), "2", "mean in '1'"),
    "two-way lstm": (Over(nn.LSTM(4, 2, batch_first=True, bidirectional=True)), "behind", "lstm in 'middle'"),
    "heads": (Over(Heads(False, False)), "behind", "attention"),
    "heads with weights": (Over(Heads(False, True)), "behind", "in 'middle.heads'"),
    "attention": (Over(scaled(False)), "behind", "attention"),
    "queries first": (Over(queries_first(False)), "behind", "in 'middle'"),
    "keys first": (Over(keys_first(False)), "behind", "in 'middle'"),
    "linear attention": (Over(Then(lambda x: x @ (x.transpose(1, 2) @ x))), "behind", "bmm in 'middle'"),
    "transformer layer": (Over(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), "behind", "in 'middle.self_attn'"),
    "circular": (nn.Sequential(nn.Conv1d(1, 2, 5, padding=2, padding_mode="circular")), "0", "circular padding in '0'"),
    "circular by hand": (between(lambda x: torch.cat([x[..., -2:], x], -1)), "2", "cat in '1'"),
    "rolled to the right": (between(lambda x: x.roll(1, -1)), "2", "roll in '1'"),
    "a number that Python read": (between(lambda x: x / x.abs().max().item()), "2", "item in '1'"),
}  # fmt: skip


def lengths_of(name):
    return (60, 56, 48, 40) if name == "unet" else LENGTHS  # it takes multiples of four


@pytest.mark.parametrize("fill", ["noise", "zeros"])
@pytest.mark.parametrize("name", CLEAN)
def test_where_nothing_is_said_every_frame_is_that_of_the_sound_alone(name, fill):
    model, layer = CLEAN[name]
    x, rows, said = samples_of(prepared(model), layer, LENGTHS, fill)
    assert said == 0
    assert differing(model, x, LENGTHS, layer, rows) == 0


@pytest.mark.parametrize("name", NEAR_THE_END)
def test_where_the_last_frames_are_named_these_differ_and_no_others(name):
    model, layer = NEAR_THE_END[name]
    lengths = lengths_of(name)
    x, rows, said = samples_of(prepared(model), layer, lengths, "noise")
    assert said == differing(model, x, lengths, layer, rows) > 0


@pytest.mark.parametrize("name", NEAR_THE_END)
def test_of_sounds_padded_with_zeros_no_more_frames_differ_than_are_named(name):
    model, layer = NEAR_THE_END[name]
    lengths = lengths_of(name)
    x, rows, said = samples_of(prepared(model), layer, lengths, "zeros")
    assert said >= differing(model, x, lengths, layer, rows)


@pytest.mark.parametrize("name", EVERY)
def test_where_every_frame_is_named_the_cause_is_and_frames_differ(name):
    model, layer, cause = EVERY[name]
    with pytest.warns(CoverageWarning) as messages:
        times = timeline(prepared(model), torch.rand(1, 1, FULL, dtype=torch.float64))
        x = batch_of(LENGTHS)
        with torch.no_grad(), capture(model, layer) as acts:
            model(x)
        rows = [next(iter(row.values())) for row in acts.samples(lengths=LENGTHS, timeline=times)]
    assert claimed(messages, layer) == "every"
    assert cause in str(messages[0].message)
    assert differing(model, x, LENGTHS, layer, rows) > 0


@pytest.mark.parametrize("name", [*NEAR_THE_END, *EVERY])
def test_in_a_batch_of_sounds_of_one_length_nothing_is_said(name):
    model, layer = {**NEAR_THE_END, **EVERY}[name][:2]
    assert samples_of(prepared(model), layer, (48, 48), "noise")[2] == 0


def test_random_chains_of_layers_differ_where_it_is_said_and_nowhere_else():
    makers = [
        lambda r: nn.Conv1d(2, 2, r.choice([1, 2, 3, 5]), r.choice([1, 1, 2]), r.choice([0, 0, 1, 2])),
        lambda r: nn.ConvTranspose1d(2, 2, 4, 2, r.choice([0, 1])),
        lambda r: nn.AvgPool1d(r.choice([2, 3]), r.choice([1, 2]), r.choice([0, 1])),
        lambda r: nn.ReflectionPad1d((r.choice([0, 1, 2]), r.choice([0, 1]))),
        lambda r: nn.ConstantPad1d((r.choice([-1, 0, 2]), r.choice([-2, 0, 1])), 0.5),
        lambda r: nn.Upsample(scale_factor=2, mode=r.choice(["nearest", "linear"])),
        lambda r: Then(lambda x: x[..., 1::2]),
    ]
    lengths, said_something = (80, 79, 71, 60, 45), 0
    for seed in range(40):
        draw = random.Random(seed)
        middle = [draw.choice(makers)(draw) for _ in range(draw.randint(1, 5))]
        model = nn.Sequential(nn.Conv1d(1, 2, 3), *middle, nn.Conv1d(2, 2, 1))
        layer = str(len(model) - 1)
        x, rows, said = samples_of(prepared(model), layer, lengths, "noise")
        assert said == differing(model, x, lengths, layer, rows), (seed, model)
        said_something += said > 0
    assert 10 < said_something < 40


def test_one_warning_names_the_first_layers_how_many_there_are_and_what_to_write():
    model = nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(6)), nn.GroupNorm(1, 1), nn.Conv1d(1, 1, 1))
    times = timeline(model, torch.rand(1, 1, 40))
    with torch.no_grad(), capture(model) as acts:
        model(torch.rand(2, 1, 40))
        model(torch.rand(2, 1, 30))
    with pytest.warns(CoverageWarning) as messages:
        acts.samples(lengths=[40, 20, 30, 20], timeline=times)
    assert len(messages) == 1
    text = str(messages[0].message)
    assert text.startswith("the valid frames of 7 layers in padded batches differ from those of each input alone")
    assert "same padding: the last frame of '0'" in text
    assert "same padding: the last 2 frames of '1'" in text
    assert "batches of equal length, or one at a time (batch size 1)" in text
    assert messages[0].filename == __file__


def test_an_output_without_a_time_axis_is_named_too():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Conv1d(4, 2, 1))
    times = timeline(model, torch.rand(1, 1, 40))
    with torch.no_grad(), capture(model, "2") as acts:
        model(torch.rand(2, 1, 40))
    with pytest.warns(CoverageWarning, match="mean in '1': every frame of '2'"):
        acts.samples(lengths=[40, 20], timeline=times)


# -- data sets


class Sounds(torch.utils.data.Dataset):
    """Sounds of these lengths; batches of three."""

    def __init__(self, lengths=(50, 31, 44, 50, 20, 33)):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return torch.rand(self.lengths[i], generator=torch.Generator().manual_seed(i), dtype=torch.float64) + 0.1


def padded(rows):
    lengths = torch.tensor([len(row) for row in rows])
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    return {"x": x[:, None], "mask": mask, "lengths": lengths}


def go(model, path, *args, sounds=None, **options):
    options = {
        "batch_size": 3,
        "collate_fn": padded,
        "inputs": lambda batch: ((batch["x"],), {}),
        "lengths": lambda batch: batch["lengths"],
        "progress": False,
        **options,
    }
    return extract(model, Sounds() if sounds is None else sounds, path, *args, **options)


def normed():
    return prepared(
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Conv1d(2, 2, 1))
    )


def test_extract_warns_once_and_the_store_keeps_what_it_said(tmp_path):
    model = normed()
    with pytest.warns(CoverageWarning) as messages:
        go(model, tmp_path)
    assert len(messages) == 1
    assert messages[0].filename == __file__
    store = Store(tmp_path)
    assert store.padding == {"1": "same padding: the last frame", "3": "group_norm in '2': every frame"}
    assert (
        "padded batches: the frames of 2 layers are not those of each input alone: same padding: the last frame (1)"
        in str(store)
    )
    sounds = Sounds()
    for layer, most in (("0", 0), ("1", 1), ("3", 50)):
        for i, row in enumerate(store[layer]):
            one = alone(model, sounds[i][None, None], layer)
            same = [torch.allclose(a, b, rtol=1e-9) for a, b in zip(row.T, one.T, strict=True)]
            assert all(same[: max(0, len(same) - most)])
        assert all(same) is (most == 0)  # of the last sound, which is padded


def test_extract_of_sounds_of_one_length_a_batch_says_nothing_and_marks_nothing(tmp_path):
    store = go(normed(), tmp_path, sounds=Sounds((50, 50, 50, 31, 31, 31)))
    assert store.padding == {}
    assert "padded" not in str(store)


def test_a_padded_batch_that_comes_late_is_noticed(tmp_path):
    with pytest.warns(CoverageWarning, match="group_norm in '2': every frame of '3'"):
        store = go(normed(), tmp_path, sounds=Sounds((50, 50, 50, 50, 31, 20)))
    assert set(store.padding) == {"1", "3"}


def test_the_mark_is_there_when_a_run_dies_after_its_first_shard(tmp_path):
    class Fails(Sounds):
        def __getitem__(self, i):
            if i == 5:
                raise OSError("sample 5 cannot be read")
            return super().__getitem__(i)

    with pytest.warns(CoverageWarning), pytest.raises(OSError, match="sample 5"):
        go(normed(), tmp_path, sounds=Fails())
    assert len(Store(tmp_path)) == 3
    assert set(Store(tmp_path).padding) == {"1", "3"}
    with pytest.warns(CoverageWarning):
        assert set(go(normed(), tmp_path).padding) == {"1", "3"}


def test_the_first_layer_finds_the_zeros_of_its_padding_where_batches_are_padded_with_zeros(tmp_path):
    model = prepared(nn.Sequential(nn.Conv1d(1, 2, 5, padding=2)))
    store = go(model, tmp_path / "zeros")
    assert store.padding == {}
    sounds = Sounds()
    assert all(torch.allclose(row, alone(model, sounds[i][None, None], "0")) for i, row in enumerate(store["0"]))

    def ones(rows):
        batch = padded(rows)
        return {**batch, "x": batch["x"].masked_fill(~batch["mask"][:, None], 1.0)}

    with pytest.warns(CoverageWarning, match="same padding: the last 2 frames of '0'"):
        go(model, tmp_path / "ones", collate_fn=ones)


class Masked(nn.Module):
    """An attention and a padded convolution, each with the mask of the padding, if there is one."""

    def __init__(self, kind):
        super().__init__()
        self.before, self.behind = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 2, 3, padding=1)
        self.kind, self.heads = kind, nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, mask=None):
        y = self.before(x).transpose(1, 2)
        hidden = None if mask is None else ~mask
        if self.kind == "heads":
            y = self.heads(y, y, y, key_padding_mask=hidden, need_weights=False)[0]
        elif self.kind == "heads with weights":
            y = self.heads(y, y, y, key_padding_mask=hidden)[0]
        elif self.kind == "scaled":
            keep = None if mask is None else mask[:, None, None]
            y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], attn_mask=keep)[:, 0]
        elif self.kind in ("queries first", "keys first"):
            scores, dim = y @ y.transpose(1, 2), 2 if self.kind == "queries first" else 1
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, None] if dim == 2 else hidden[:, :, None], -torch.inf)
            weights = scores.softmax(dim)
            y = (weights if dim == 2 else weights.transpose(1, 2)) @ y
        elif self.kind == "sum":
            y = y * (y if mask is None else y * mask[..., None]).sum(1, keepdim=True)
        if mask is not None and self.kind != "filled":
            y = y * mask[..., None]
        elif mask is not None:
            y[~mask[..., None].expand_as(y)] = 0
        return self.behind(y.transpose(1, 2))


@pytest.mark.parametrize(
    "kind", ["heads", "heads with weights", "scaled", "queries first", "keys first", "sum", "filled", "product"]
)
def test_a_mask_that_keeps_the_padding_out_is_seen(kind, tmp_path):
    model, sounds = prepared(Masked(kind)), Sounds()
    store = go(model, tmp_path / "masked", inputs=lambda batch: ((batch["x"],), {"mask": batch["mask"]}))
    assert store.padding == {}
    for i, row in enumerate(store["behind"]):
        assert torch.allclose(row, alone(model, sounds[i][None, None], "behind"), rtol=1e-9)
    with pytest.warns(CoverageWarning, match="of 'behind'"):
        go(model, tmp_path / "without")


def test_a_mask_after_a_padded_layer_does_not_hide_its_last_frames(tmp_path):
    class Late(Masked):
        def __init__(self):
            super().__init__("scaled")
            self.before = nn.Conv1d(1, 4, 3, padding=1)
            self.second = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x, mask=None):
            y = self.second(self.before(x)).transpose(1, 2)
            keep = None if mask is None else mask[:, None, None]
            return self.behind(
                F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], attn_mask=keep)[:, 0].mT
            )

    with pytest.warns(CoverageWarning, match="every frame of 'behind'"):
        store = go(prepared(Late()), tmp_path, inputs=lambda batch: ((batch["x"],), {"mask": batch["mask"]}))
    assert store.padding["second"] == "same padding: the last frame"


def test_batch_norm_in_train_mode_is_named(tmp_path):
    model = prepared(nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1)))
    with pytest.warns(CoverageWarning, match="batch_norm in '1', in train mode: every frame of '2'"):
        go(model, tmp_path / "train", mode="train")
    assert go(model, tmp_path / "eval").padding == {}


# -- which input, which axis, which method


class Pair(nn.Module):
    """Two inputs with a time axis each, and a method of its own for one of them."""

    def __init__(self):
        super().__init__()
        self.speech, self.text = nn.Conv1d(1, 2, 3, 2), nn.Conv1d(4, 2, 5)

    def forward(self, wave, letters):
        return self.speech(wave).mean() + self.text(letters.transpose(1, 2)).mean()

    def encode(self, wave):
        return self.speech(wave)


def test_samples_are_cut_by_the_input_that_the_timeline_follows():
    model, wave, letters = Pair(), torch.rand(2, 1, 50), torch.rand(2, 30, 4)
    with torch.no_grad(), capture(model, "text") as acts:
        model(wave, letters)
    times = timeline(model, (wave, letters), signal="letters", time_dim=1)
    rows = acts.samples(lengths=[30, 20], timeline=times)
    assert [tuple(row["text"].shape) for row in rows] == [(2, 26), (2, 16)]
    assert torch.equal(rows[1]["text"], acts["text"][1][:, :16])


def test_extract_cuts_by_the_input_and_the_axis_that_are_named(tmp_path):
    model, lengths = Pair(), [30, 20]
    data = [{"wave": torch.rand(2, 1, 50), "letters": torch.rand(2, 30, 4)}]
    store = extract(
        model, data, tmp_path, "text", lengths=lambda batch: lengths, signal="letters", time_dim=1, progress=False
    )
    assert [tuple(row.shape) for row in store["text"]] == [(2, 26), (2, 16)]


def test_the_input_that_is_named_comes_before_the_one_that_extract_finds(tmp_path):
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 5)

        def forward(self, left, right):
            return self.left(left).mean() + self.right(right).mean()

    model, data = Sides(), [{"left": torch.rand(2, 1, 50), "right": torch.rand(2, 1, 50)}]
    options = {"lengths": lambda batch: [50, 20], "progress": False}
    found = extract(model, data, tmp_path / "found", "right", **options)
    assert [tuple(row.shape) for row in found["right"]] == [(2, 46), (2, 16)]
    for number, signal in enumerate(("right", 1, -1)):
        named = extract(model, data, tmp_path / str(number), "right", signal=signal, **options)
        assert [tuple(row.shape) for row in named["right"]] == [(2, 46), (2, 16)]
    with pytest.raises(
        Unsupported, match="'right' is unknown, .* not depend on the signal 'left', but on the input 'right'"
    ):
        extract(model, data, tmp_path / "left", "right", signal="left", **options)


def test_each_part_of_an_output_has_its_own_difference(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4)

        def forward(self, x):
            y = self.conv(x)
            return {"near": y, "far": [self.norm(y).transpose(1, 2)]}

    model = prepared(nn.Sequential(Two()))
    x, options = batch_of(LENGTHS), {"types": Two, "lengths": lambda batch: LENGTHS, "progress": False}
    with pytest.warns(CoverageWarning, match=re.escape("every frame of '0[far][0]').")):
        store = extract(model, [x], tmp_path / "all", **options)
    assert store.padding == {"0[far][0]": "group_norm in '0.norm': every frame"}
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            one = model(x[row : row + 1, :, :length])
        assert torch.allclose(store["0[near]"][row], one["near"][0], rtol=1e-9, atol=0)
        assert store["0[far][0]"][row].shape == one["far"][0][0].shape
        assert torch.allclose(store["0[far][0]"][row], one["far"][0][0], rtol=1e-9, atol=0) == (length == max(LENGTHS))
    assert extract(model, [x], tmp_path / "near", "0[near]", **options).padding == {}


def test_extract_runs_the_method_and_takes_it_into_the_identity(tmp_path):
    from convtap import StoreError

    model, data = Pair(), [torch.rand(2, 1, 50)]
    store = extract(model, data, tmp_path, method="encode", progress=False)
    assert store.layers == ["speech"]
    with torch.no_grad():
        assert torch.equal(torch.stack(list(store["speech"])), model.encode(data[0]))
    with pytest.raises(StoreError, match="method: 'encode' then, None now"):
        extract(model, data, tmp_path, progress=False)
    cut = extract(model, data, tmp_path / "cut", method="encode", lengths=lambda batch: [50, 21], progress=False)
    assert [row.shape[-1] for row in cut["speech"]] == [24, 10]


def test_extract_of_activations_says_that_the_way_to_them_is_not_followed(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.GroupNorm(1, 4), nn.ReLU())
    x = torch.randn(2, 1, 20)
    x[1, :, 12:] = 0
    with pytest.warns(CoverageWarning, match="the layers between the convolution and its activation are not followed"):
        store = extract(model, [x], tmp_path / "s", at="activation", lengths=lambda batch: [20, 12], progress=False)
    assert "not followed" in store.padding["0"]
