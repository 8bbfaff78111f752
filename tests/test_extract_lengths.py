"""Ragged inputs: rows cut to their valid frames before anything else, and the layers for which nobody knows them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convtap._dataset.extract import extract
from convtap._errors import CoverageWarning, InvalidType, InvalidValue, Unsupported
from tests.reference import cloning_hooks, same


def padded(rows):
    """A collate function: the padded batch, and how long each row really is."""
    lengths = torch.tensor([len(row) for row in rows])
    return {"x": nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None], "lengths": lengths}


class Signals(torch.utils.data.Dataset):
    lengths = (50, 31, 44, 12, 50, 20, 33)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return torch.randn(self.lengths[i], generator=torch.Generator().manual_seed(i))


def go(model, path, *args, **options):
    options = {
        "batch_size": 3,
        "collate_fn": padded,
        "inputs": lambda batch: ((batch["x"],), {}),
        "lengths": lambda batch: batch["lengths"],
        "progress": False,
        **options,
    }
    return extract(model, Signals(), path, *args, **options)


def chain():
    return nn.Sequential(
        nn.Conv1d(1, 4, 5, stride=2),
        nn.GELU(),
        nn.Conv1d(4, 4, 3, padding="same", dilation=2),
        nn.Conv1d(4, 3, 4, stride=3, padding=1, dilation=2),
    )


def frames(layer, length):
    """By hand: kernel 5, stride 2; kernel 3, "same"; kernel 4, stride 3, padding 1, dilation 2 (it reaches over 7)."""
    length = (length - 5) // 2 + 1
    return length if layer in ("0", "2") else (length + 2 - 7) // 3 + 1


def by_hand(model, layer):
    """Every sample's output of a layer, computed in its padded batch and cut."""
    data, found = Signals(), []
    for start in range(0, len(data), 3):
        rows = [data[i] for i in range(start, min(start + 3, len(data)))]
        with cloning_hooks(model.eval()) as seen, torch.inference_mode():
            model(padded(rows)["x"])
        found.extend(output[:, : frames(layer, len(row))] for row, output in zip(rows, dict(seen)[layer], strict=True))
    return found


def test_rows_are_cut_to_their_valid_frames(tmp_path):
    model = chain()
    with pytest.warns(CoverageWarning, match="same padding"):
        store = go(model, tmp_path)
    for layer in ("0", "2", "3"):
        assert same(list(store[layer]), by_hand(model, layer))
    assert store["3"].shape == (7, 3, None)


def test_reduce_sees_one_sample_of_valid_frames_and_dtype_comes_after_it(tmp_path):
    model, shapes = chain(), []

    def mean(row):
        shapes.append((tuple(row.shape), row.dtype))
        return row.mean(-1)

    with pytest.warns(CoverageWarning, match="same padding: the last 2 frames of '2'"):
        store = go(model, tmp_path, "2", reduce=mean, dtype=torch.bfloat16)
    rows = by_hand(model, "2")
    assert shapes == [(tuple(row.shape), torch.float32) for row in rows]
    assert torch.equal(torch.stack(list(store["2"])), torch.stack([row.mean(-1) for row in rows]).bfloat16())


def test_a_complex_row_is_cast_to_complex_types_and_to_no_others(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 2, 5))
    options = {"lengths": lambda batch: batch["lengths"], "reduce": lambda t: torch.fft.fft(t)}
    for number, lengths in enumerate((options["lengths"], None)):
        with pytest.raises(
            InvalidValue, match="layer '0': dtype=torch.float16 would drop the imaginary part of a torch.c"
        ):
            go(model, tmp_path / f"real{number}", **{**options, "lengths": lengths}, dtype=torch.float16)
    store = go(model, tmp_path / "complex", **options, dtype=torch.complex128)
    with torch.no_grad():
        expected = torch.fft.fft(model(Signals()[1][None, None])[0]).to(torch.complex128)
    torch.testing.assert_close(store["0"][1], expected, atol=1e-5, rtol=1e-5)


def test_without_lengths_reduce_sees_the_batch(tmp_path):
    shapes = []

    def mean(batch):
        shapes.append(tuple(batch.shape))
        return batch.mean(-1)

    go(chain(), tmp_path, "0", reduce=mean, lengths=None)
    assert shapes == [(3, 4, 23), (3, 4, 23), (1, 4, 15)]


class Branches(nn.Module):
    """Two branches of different strides, and pooling in one of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.skip = nn.Conv1d(1, 2, 3, stride=2), nn.Conv1d(2, 2, 3), nn.Conv1d(1, 2, 1)
        self.pool = nn.MaxPool1d(2)

    def forward(self, x):
        return self.second(self.pool(self.first(x))).mean() + self.skip(x).mean()


def test_branches_and_pooling_are_followed(tmp_path):
    store = go(Branches(), tmp_path)
    assert [row.shape[-1] for row in store["first"]] == [(n - 3) // 2 + 1 for n in Signals.lengths]
    assert [row.shape[-1] for row in store["second"]] == [((n - 3) // 2 + 1) // 2 - 2 for n in Signals.lengths]
    assert [row.shape[-1] for row in store["skip"]] == list(Signals.lengths)


class Transposed(nn.Module):
    """Its linear layer gives (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(1, 4, 3, stride=2), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(self.conv(x).transpose(1, 2))


def test_time_is_cut_where_it_is(tmp_path):
    store = go(Transposed(), tmp_path, types=nn.Linear)
    assert [tuple(row.shape) for row in store["linear"]] == [((n - 3) // 2 + 1, 5) for n in Signals.lengths]


class Spectral(nn.Module):
    """Its convolution runs over frequencies, not over time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x):
        return self.conv(torch.fft.rfft(x).abs())


def test_a_layer_whose_valid_frames_are_not_known_is_an_error_that_says_why(tmp_path):
    with pytest.raises(Unsupported, match=r"the number of real frames of 'conv' is unknown, .*Deselect the layer"):
        go(Spectral(), tmp_path / "spectral")
    twice = nn.Sequential(nn.Conv1d(1, 1, 3))
    twice.append(twice[0])
    with pytest.raises(Unsupported, match=r"of '0' is unknown, but lengths= needs it: '0' ran 2 times"):
        go(twice, tmp_path / "twice", calls="keys")


def test_positional_and_keyword_inputs_together_are_followed_too(tmp_path):
    class Scaled(Transposed):
        def forward(self, x, *, scale):
            return super().forward(x * scale)

    store = go(Scaled(), tmp_path, inputs=lambda batch: ((batch["x"],), {"scale": 2.0}))
    assert [row.shape[-1] for row in store["conv"]] == [(n - 3) // 2 + 1 for n in Signals.lengths]


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (lambda batch: "abc", InvalidType, r"lengths\(batch\) returned a str, which is not a sequence of ints"),
        (lambda batch: [0.5, 1, 2], InvalidType, "not a sequence of ints"),
        (lambda batch: [1, 2], InvalidValue, "returned 2 lengths for 3 rows"),
        (lambda batch: [1, 2, 51], InvalidValue, "returned 51, but the padded input has 50 samples"),
        (lambda batch: [1, 2, -1], InvalidValue, "returned -1"),
    ],
)
def test_lengths_that_cannot_be_used(lengths, error, message, tmp_path):
    with pytest.raises(error, match=message):
        go(chain(), tmp_path, lengths=lengths)


# -- which argument the lengths are of


class Film(nn.Module):
    """Takes the signal, a vector for each row and a mask, in an order of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv1d(4, 4, 3, stride=2), nn.Linear(16, 4)

    def forward(self, condition, x, mask=None):
        x = x if mask is None else x * mask
        return self.conv(x) * self.scale(condition)[..., None]


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.film = nn.Conv1d(1, 4, 5, stride=2), Film()

    def forward(self, condition, x, padding_mask=None):
        y = self.first(x)
        mask = None if padding_mask is None else padding_mask[:, None, : y.shape[-1]]
        return self.film(condition, y, mask=mask)


LENGTHS = [50, 31, 44, 12]
AFTER_FIRST = [(n - 5) // 2 + 1 for n in LENGTHS]


def conditioned(path, at, size=16, keywords=False, **options):
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    net, x, condition = Conditioned(), torch.randn(4, 1, 50, generator=draw), torch.randn(4, 16, generator=draw)
    condition = torch.cat([condition] * (size // 16), -1)
    net.film.scale = nn.Linear(size, 4)
    mask = (torch.arange(50) < torch.tensor(LENGTHS)[:, None]).float()
    inputs = ((), {"padding_mask": mask, "condition": condition, "x": x}) if keywords else ((condition, x, mask), {})
    options = {"types": (nn.Conv1d, Film, nn.Linear), "layers": ["first", "film"], **options}
    store = extract(
        net, [x], path, at=at, inputs=lambda batch: inputs, lengths=lambda batch: LENGTHS, progress=False, **options
    )
    return net.eval(), x, condition, mask, store


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords"])
@pytest.mark.parametrize("size", [16, 64], ids=["a shorter vector", "a longer vector"])
def test_lengths_are_of_the_signal_and_not_of_another_argument(size, keywords, tmp_path):
    net, x, _, _, store = conditioned(tmp_path, "output", size, keywords, layers="first")
    with torch.inference_mode():
        whole = net.first(x)
    assert same(list(store["first"]), [row[:, :count] for row, count in zip(whole, AFTER_FIRST, strict=True)])


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords"])
def test_a_layers_input_is_cut_by_its_own_time_axis_and_what_is_no_signal_stays_whole(keywords, tmp_path):
    net, x, condition, _, store = conditioned(tmp_path, "input", 64, keywords)
    assert store.layers == ["first", "film[args][0]", "film[args][1]", "film[mask]"]
    with torch.inference_mode():
        given = net.first(x)
    assert same(list(store["first"]), [row[:, :n] for row, n in zip(x, LENGTHS, strict=True)])
    assert same(list(store["film[args][1]"]), [row[:, :n] for row, n in zip(given, AFTER_FIRST, strict=True)])
    assert same(list(store["film[args][0]"]), list(condition))
    assert {tuple(row.shape) for row in store["film[mask]"]} == {(1, 23)}


def test_the_part_of_an_input_that_is_the_signal_can_be_selected_alone(tmp_path):
    store = conditioned(
        tmp_path, "input", layers=["film[args][1]", "film.conv"], reduce={"film*": lambda t: t[..., -1]}
    )[-1]
    whole = conditioned(tmp_path / "whole", "input", layers="film")[-1]
    assert store.layers == ["film[args][1]", "film.conv"]
    assert same(list(store["film[args][1]"]), [row[:, -1] for row in whole["film[args][1]"]])
    assert [tuple(row.shape) for row in store["film.conv"]] == [(4,)] * 4


def test_strided_and_transposed_inputs_have_their_own_frames(tmp_path):
    model = chain()
    with pytest.warns(CoverageWarning, match="same padding: the last 2 frames of '3'"):
        store = go(model, tmp_path / "a", at="input")
    for layer, before in (("2", "0"), ("3", "2")):
        assert [row.shape[-1] for row in store[layer]] == [frames(before, n) for n in Signals.lengths]
    assert [row.shape[-1] for row in store["0"]] == list(Signals.lengths)
    store = go(Transposed(), tmp_path / "b", at="input", types=nn.Linear)
    assert [tuple(row.shape) for row in store["linear"]] == [((n - 3) // 2 + 1, 4) for n in Signals.lengths]


def test_each_tensor_of_an_output_is_cut_by_its_own_time_axis(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.slow, self.fast = nn.Conv1d(1, 2, 4, stride=4), nn.Conv1d(1, 2, 2, stride=2)

        def forward(self, x):
            return {"slow": self.slow(x), "fast": self.fast(x).transpose(1, 2)}

    store = go(nn.Sequential(Two()), tmp_path / "a", types=Two)
    assert [tuple(row.shape) for row in store["0[slow]"]] == [(2, n // 4) for n in Signals.lengths]
    assert [tuple(row.shape) for row in store["0[fast]"]] == [(n // 2, 2) for n in Signals.lengths]
    store = go(nn.Sequential(Two()), tmp_path / "b", "0[fast]")
    assert [tuple(row.shape) for row in store["0[fast]"]] == [(n // 2, 2) for n in Signals.lengths]


def test_a_part_without_a_time_axis_is_an_error_and_the_rest_can_be_selected(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(1, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x.transpose(1, 2))[0].sum()

    with pytest.raises(Unsupported, match=r"real frames of 'lstm\[1\]\[0\]'|'lstm\[1\]\[0\]' are not the samples"):
        go(Recurrent(), tmp_path / "a", types=nn.LSTM)
    store = go(Recurrent(), tmp_path / "b", "lstm[0]")
    assert [tuple(row.shape) for row in store["lstm[0]"]] == [(n, 3) for n in Signals.lengths]


def test_a_wav2vec2_encoder_gives_the_frames_that_transformers_says(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_feat_extract_layers=3,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2Model(config)
    lengths = [900, 1500, 700, 1200]
    data = [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in lengths]
    inputs = nn.utils.rnn.pad_sequence(data, batch_first=True)
    mask = torch.arange(1500)[None] < torch.tensor(lengths)[:, None]
    store = extract(
        model,
        [{"input_values": inputs, "attention_mask": mask.long()}],
        tmp_path,
        lengths=lambda batch: batch["attention_mask"].sum(1),
        progress=False,
    )
    assert len(store.layers) == 4
    last = store["feature_extractor.conv_layers.2.conv"]
    assert [row.shape[-1] for row in last] == model._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
    with cloning_hooks(model.eval()) as seen, torch.inference_mode():
        model(inputs, attention_mask=mask.long())
    for name, output in seen:
        for row, whole in zip(store[name], output, strict=True):
            assert torch.equal(row, whole[:, : row.shape[-1]])
