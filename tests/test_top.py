"""The windows that drive a channel most: against a search by hand over all frames of the data set."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import convtap
from convtap import AmbiguousCall, LayerNotFound, NonFiniteOutput, Unsupported, windows
from convtap._errors import InvalidType, InvalidValue, OutOfRange
from convtap._time.top import top
from tests.models import ReusedConv

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv1d(2, 3, 4, stride=2, padding=1), nn.Tanh(), nn.Conv1d(3, 5, 3, padding=1)).eval()


def by_hand(model, x, k, per_sample=1, threshold=-math.inf):
    """For each channel of the last layer the best (value, sample, frame), by sorting all of them."""
    with torch.no_grad():
        output = model(x)
    found = []
    for channel in range(output.shape[1]):
        every = []
        for sample in range(len(x)):
            frames = sorted(((-value, frame) for frame, value in enumerate(output[sample, channel].tolist())))
            every += [(-value, sample, frame) for value, frame in frames[:per_sample]]
        every = sorted((one for one in every if one[0] >= threshold), key=lambda one: (-one[0], one[1], one[2]))
        found.append(every[:k])
    return found


def channels_of(hits, count):
    return [
        [(pytest.approx(hit.value, abs=1e-5), hit.sample, hit.frame) for hit in hits if hit.channel == channel]
        for channel in range(count)
    ]


@pytest.mark.parametrize("per_sample", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 20])
def test_hits_equal_a_full_sort_however_the_data_is_batched(model, per_sample, batch_size):
    x = torch.randn(20, 2, 60)
    hits = top(model, DataLoader(TensorDataset(x), batch_size=batch_size), "2", 6, per_sample=per_sample)
    assert channels_of(hits, 5) == by_hand(model, x, 6, per_sample)


def test_complex_outputs_are_ranked_by_magnitude():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, dtype=torch.complex64))
    x = torch.randn(4, 1, 30, dtype=torch.complex64)
    with torch.no_grad():
        magnitudes = model(x).abs().numpy()
    hits = [hit for hit in top(model, x, "0", 1) if hit.channel == 1]
    assert [hit.value for hit in hits] == [pytest.approx(magnitudes[:, 1].max())]


def test_start_and_stop_are_the_samples_that_reach_the_frame(model):
    x = torch.randn(6, 2, 60, requires_grad=True)
    output = model(x)
    for hit in top(model, x.detach(), "2", 6):
        (gradient,) = torch.autograd.grad(output[hit.sample, hit.channel, hit.frame], x, retain_graph=True)
        seen = gradient[hit.sample].abs().sum(0).nonzero().flatten()
        assert hit.start <= int(seen[0])
        assert int(seen[-1]) < hit.stop
        if hit.start >= 0 and hit.stop <= 60:
            assert (hit.start, hit.stop) == (int(seen[0]), int(seen[-1]) + 1)


def test_a_threshold_and_channels_leave_out_the_rest(model):
    x = torch.randn(20, 2, 60)
    expected = by_hand(model, x, 10, threshold=0.4)
    hits = top(model, x, "2", 10, channels=[3, -1], threshold=0.4)
    assert sorted({hit.channel for hit in hits}) == [channel for channel in (3, 4) if expected[channel]]
    assert channels_of(hits, 5)[3:] == expected[3:]
    assert channels_of(top(model, x, "2", 10, channels=2), 5)[2] == by_hand(model, x, 10)[2]


def test_a_threshold_that_nothing_reaches_gives_an_empty_table(model):
    hits = top(model, torch.randn(4, 2, 60), "2", 3, threshold=1e6)
    assert len(hits) == 0
    assert str(hits) == "no hits\n4 inputs searched"


def test_of_equal_values_the_earlier_one_is_kept():
    model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.zeros(4, 1, 8)
    x[:, 0, [2, 5]] = 1.0
    hits = top(model, x.split(2), "0", 3, per_sample=2)
    assert [(hit.sample, hit.frame) for hit in hits] == [(0, 2), (0, 5), (1, 2)]


def test_a_window_is_cut_out_and_padded_with_zeros_where_it_leaves_the_signal():
    model = nn.Sequential(nn.Conv1d(1, 1, 5, padding=2, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.zeros(2, 1, 6)
    x[0, 0, 0], x[1, 0, 3:] = 5.0, torch.tensor([1.0, 2.0, 3.0])
    first, second = sorted(top(model, x, "0", 2), key=lambda hit: hit.sample)
    assert (first.start, first.stop) == (-2, 3)
    window = first.window(x)
    assert window.values.tolist() == [[0.0, 0.0, 5.0, 0.0, 0.0]]
    assert window.inside.tolist() == [False, False, True, True, True]
    assert (second.start, second.stop) == (1, 6)
    assert second.window(x[1]).values.tolist() == [[0.0, 0.0, 1.0, 2.0, 3.0]]
    assert second.window(x[1]).inside.all()
    assert torch.equal(second.window(TensorDataset(x)).values, second.window(x).values)


def test_windows_of_channels_last_inputs_keep_their_axes():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 1, 3)

        def forward(self, x):
            return self.conv(x.transpose(1, 2))

    x = torch.randn(3, 20, 2)
    hit = top(Last(), x, "conv", 1, time_dim=1)[0]
    assert torch.equal(hit.window(x).values, x[hit.sample, hit.start : hit.stop])


def test_batches_may_be_tensors_keyword_dicts_and_pairs_with_a_label(model):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *, x):
            return self.inner(x)

    x = torch.randn(6, 2, 60)
    expected = channels_of(top(model, [x], "2", 2), 5)
    assert channels_of(top(model, [(part, torch.zeros(3)) for part in x.split(3)], "2", 2), 5) == expected
    assert channels_of(top(Named(), [{"x": part} for part in x.split(3)], "inner.2", 2), 5) == expected
    assert channels_of(top(model, iter(x.split(3)), "2", 2, example=x[:1]), 5) == expected


def test_batches_may_have_different_lengths(model):
    x = [torch.randn(2, 2, length) for length in (60, 80, 41)]
    hits = top(model, x, "2", 6)
    expected = [by_hand(model, part, 2) for part in x]
    best = max((value, i) for i, part in enumerate(expected) for value, _, _ in part[0])
    first = next(hit for hit in hits if hit.channel == 0)
    assert first.value == pytest.approx(best[0], abs=1e-5)
    assert first.sample // 2 == best[1]


def test_what_is_kept_does_not_grow_with_the_data(model):
    from convtap._time import top as _top

    search = _top._Search(model.eval(), "2", 4, None, 2, None, None, -1)
    sizes = []
    with torch.no_grad():
        for _ in range(5):
            search.add(torch.randn(8, 2, 60))
            sizes.append(sum(part.numel() for part in search._best))
    assert sizes == [3 * 5 * 4] * 5  # value, sample and frame; 5 channels; 4 hits each


def test_one_run_of_a_layer_that_runs_several_times_can_be_searched():
    model, x = ReusedConv(), torch.randn(3, 4, 20)
    first, third = (top(model, x, f"conv#{i}", 1, channels=0)[0] for i in (0, 2))
    assert (first.stop - first.start, third.stop - third.start) == (3, 7)
    with pytest.raises(AmbiguousCall, match="'conv' ran 3 times"):
        top(model, x, "conv", 1)


def test_the_model_is_left_as_it_was(model):
    model.train()
    top(model, torch.randn(3, 2, 60), "0", 1)
    assert all(module.training for module in model.modules())
    assert not model[0]._forward_hooks
    assert torch.is_grad_enabled()


def test_a_layer_that_gives_nan_is_named_with_the_input(model):
    x = torch.randn(4, 2, 60)
    x[3, 0, 10] = math.nan
    with pytest.raises(NonFiniteOutput, match="'2' produced NaN for input 3"):
        top(model, x.split(2), "2", 1)


# -- hits apart from each other


def apart_by_hand(outputs, centres, k, distance, per_sample=None):
    """For each channel of (N, C, T) the best (value, sample, frame), without those too close to a higher one."""
    found = []
    for channel in range(outputs.shape[1]):
        every = []
        for sample, values in enumerate(outputs[:, channel]):
            kept = []
            for frame in np.argsort(-values, kind="stable"):
                if all(abs(centres[frame] - centres[other]) >= distance for other in kept):
                    kept.append(int(frame))
            every += [(float(values[frame]), sample, frame) for frame in kept[:per_sample]]
        found.append(sorted(every, key=lambda one: (-one[0], one[1], one[2]))[:k])
    return found


@pytest.mark.parametrize("per_sample", [None, 2])
@pytest.mark.parametrize("distance", [1, 2, 3, 8, 15, 59, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_hits_apart_equal_suppression_by_hand_however_the_data_is_batched(model, per_sample, distance, batch_size):
    x = torch.randn(20, 2, 60)
    with torch.no_grad():
        outputs = model(x).numpy()
    centres = [0.5 + 2 * t for t in range(outputs.shape[2])]  # kernel 4, stride 2, padding 1; then same padding
    options = {} if per_sample is None else {"per_sample": per_sample}
    hits = top(model, x.split(batch_size), "2", 30, min_distance=distance, **options)
    assert channels_of(hits, 5) == apart_by_hand(outputs, centres, 30, distance, per_sample)


def test_the_distance_of_upsampled_frames_is_in_input_samples_too():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, stride=4), nn.ConvTranspose1d(2, 3, 8, stride=8)).eval()
    x = torch.randn(3, 1, 100)
    with torch.no_grad():
        outputs = model(x).numpy()
    centres = [t / 2 for t in range(outputs.shape[2])]
    for distance in (1, 2, 5):
        hits = top(model, x, "1", 20, min_distance=distance)
        assert channels_of(hits, 3) == apart_by_hand(outputs, centres, 20, distance)


def test_a_distance_is_between_centres_and_one_of_just_that_size_is_kept():
    model = nn.Sequential(nn.Conv1d(1, 1, 1, stride=5, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.zeros(1, 1, 100)
    x[0, 0, [20, 30, 45]] = torch.tensor([3.0, 2.0, 1.0])
    frames = [[hit.frame for hit in top(model, x, "0", 9, min_distance=n, threshold=0.5)] for n in (10, 11, 15, 16, 26)]
    assert frames == [[4, 6, 9], [4, 9], [4, 9], [4, 9], [4]]


def test_of_equal_values_that_are_close_the_earlier_one_is_kept():
    model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.zeros(3, 1, 9)
    x[:, 0, 2:7] = 1.0
    hits = top(model, x.split(1), "0", 5, min_distance=3, threshold=0.5)
    assert [(hit.sample, hit.frame) for hit in hits] == [(0, 2), (0, 5), (1, 2), (1, 5), (2, 2)]


def test_hits_with_a_distance_leave_the_outputs_of_the_model_alone(model):
    x = torch.randn(4, 2, 60)
    kept = []
    hook = model[2].register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    top(model, x, "2", 5, min_distance=9)
    hook.remove()
    assert all(torch.equal(output, before) for output, before in kept)


# -- windows, stacked


class Items(Dataset):
    """A data set of single inputs with a label; counts how often each is read."""

    def __init__(self, x):
        self.x, self.read = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read.append(i)
        return self.x[i], i % 2


def cut_by_hand(hits, x, value=0.0):
    width = max((hit.stop - hit.start for hit in hits), default=0)
    padded = np.pad(x, ((0, 0), (0, 0), (width, width)), constant_values=value)
    return np.stack([padded[hit.sample, :, hit.start + width : hit.stop + width] for hit in hits])


@pytest.fixture
def data():
    return torch.randn(12, 2, 60)


@pytest.fixture
def hits(model, data):
    """Hits with windows that begin before the signal, and some that end after it."""
    found = top(model, data, "2", 60, per_sample=9)
    assert min(hit.start for hit in found) < 0 < 60 < max(hit.stop for hit in found)
    return found


def test_windows_equal_slices_of_the_padded_data(hits, data):
    found = windows(hits, data)
    assert found.shape == (len(hits), 2, 8)
    assert np.array_equal(found.numpy(), cut_by_hand(hits, data.numpy()))
    assert np.array_equal(
        windows(hits[3:9], data, padding_value=-7.5).numpy(), cut_by_hand(hits[3:9], data.numpy(), -7.5)
    )
    assert torch.equal(found, torch.stack([hit.window(data).values for hit in hits]))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.numpy()[:, :, ::-1][:, :, ::-1],
        lambda x: list(x),
        lambda x: tuple(x),
        lambda x: [one.numpy() for one in x],
        lambda x: dict(enumerate(x)),
        TensorDataset,
        Items,
    ],
    ids=["array", "big-endian", "reversed", "list", "tuple", "arrays", "dict", "TensorDataset", "Dataset"],
)
def test_windows_are_cut_out_of_data_of_every_form(hits, data, form):
    expected = cut_by_hand(hits, data.numpy())
    assert np.array_equal(windows(hits, form(data)).numpy(), expected)
    assert np.array_equal(hits[5].window(form(data)).values.numpy(), expected[5])


def test_each_input_is_read_once(hits, data):
    items = Items(data)
    windows(hits, items)
    assert sorted(items.read) == sorted({hit.sample for hit in hits})


def test_windows_of_inputs_of_several_lengths_and_of_whole_numbers():
    model = nn.Sequential(nn.Conv1d(1, 1, 5, padding=2, dtype=torch.float64))
    x = [torch.randint(0, 99, (1, length)) for length in (9, 30, 17)]
    hits = top(model, [one[None].double() for one in x], "0", 40, per_sample=40)
    longest = np.stack([np.pad(one.numpy(), ((0, 0), (0, 30 - one.shape[1])), constant_values=-1) for one in x])
    found = windows(hits, x, padding_value=-1)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), cut_by_hand(hits, longest, -1))


def test_windows_of_channels_last_data_keep_their_axes():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x.transpose(1, 2))

    x = torch.randn(3, 20, 2)
    hits = top(Last(), x, "conv", 9, time_dim=1, min_distance=4)
    expected = cut_by_hand(hits, x.numpy().transpose(0, 2, 1)).transpose(0, 2, 1)
    assert np.array_equal(windows(hits, x).numpy(), expected)


def test_windows_of_data_that_inputs_turned_into_the_call(model, data):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, audio, mask):
            return self.inner(audio) * mask

    batches = [{"id": 0, "audio": part, "mask": torch.ones(len(part), 1, 1)} for part in data.split(5)]
    found = top(
        Masked(),
        batches,
        "inner.2",
        9,
        inputs=lambda batch: ((batch["audio"],), {"mask": batch["mask"]}),
        min_distance=6,
    )
    assert channels_of(found, 5) == channels_of(top(model, data, "2", 9, min_distance=6), 5)
    assert np.array_equal(windows(found, data).numpy(), cut_by_hand(found, data.numpy()))


def test_hits_of_layers_with_other_windows_do_not_stack_and_the_message_says_what_to_write(model, data):
    both = [*top(model, data, "0", 1), *top(model, data, "2", 1)]
    with pytest.raises(InvalidValue, match="differ in length: 4, 8 samples") as caught:
        windows(both, data)
    code = str(caught.value).split("of one length: ")[1].rstrip(".")
    assert eval(code, {"windows": windows, "hits": both, "x": data}).shape == (5, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hits": []}, InvalidValue, "hits is empty. Check for that"),
        ({"hits": 3}, InvalidType, "hits is a int. Pass the result of top"),
        ({"hits": [(1, 2)]}, InvalidType, r"hits holds \(1, 2\), which is a tuple. Pass the result of top"),
        ({"x": torch.zeros(2, 60)}, InvalidType, r"x has shape \(2, 60\), which is a single input.* x\[None\]"),
        ({"x": torch.zeros(1, 2, 60)}, OutOfRange, "x holds 1 input. Pass the input"),
        ({"x": {}}, OutOfRange, "x holds 0 inputs"),
        ({"x": DataLoader(torch.zeros(12, 2, 60))}, InvalidType, "x is a DataLoader, but one input has 2 axes"),
        (
            {"x": [{"id": 3, "audio": torch.zeros(2, 60)}] * 12},
            InvalidType,
            r"x is a dict, but one input has 2 axes. Pass the signals alone: \[item\['audio'\] for item in x\].",
        ),
        (
            {"x": [torch.zeros(1 + i % 2, 60) for i in range(12)]},
            InvalidValue,
            "so they do not stack. Pass inputs with",
        ),
        ({"padding_value": "0"}, InvalidType, "padding_value is a str. Pass a number"),
        (
            {"x": torch.zeros(12, 2, 60).int(), "padding_value": math.nan},
            InvalidValue,
            r"=nan is not a value.*x.float\(\)",
        ),
        (
            {"x": torch.zeros(12, 2, 60).byte(), "padding_value": -1},
            InvalidValue,
            "=-1 is not a value of the inputs' type",
        ),
    ],
)
def test_windows_that_cannot_be_stacked_are_refused(hits, data, change, error, message):
    with pytest.raises(error, match=message):
        windows(**{"hits": hits, "x": data, **change})


def test_a_hit_is_not_taken_for_several(hits, data):
    with pytest.raises(InvalidType, match=r"hits is a Hit. .* windows\(\[hit\], x\)"):
        windows(hits[0], data)
    assert windows([hits[0]], data).shape == (1, 2, 8)


# -- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, InvalidValue, "k=0 is not a positive int. Pass at least 1"),
        ({"k": 1.5}, InvalidType, "k is a float"),
        ({"per_sample": 0}, InvalidValue, "per_sample=0"),
        ({"min_distance": 0}, InvalidValue, "min_distance=0 is not a positive int. Pass at least 1 input sample"),
        ({"min_distance": True}, InvalidValue, "min_distance=True is not a positive int"),
        ({"min_distance": 12.5}, InvalidType, "min_distance is a float. Pass a whole number of input samples"),
        ({"layer": "3"}, LayerNotFound, "no layer is named '3'"),
        ({"layer": 2}, InvalidType, "layer is a int"),
        ({"channels": 5}, OutOfRange, "channel 5 does not exist in '2', which has 5. Pass numbers from 0 to 4"),
        ({"channels": []}, InvalidValue, "channels is empty"),
        ({"channels": "all"}, InvalidType, "channels is 'all'"),
        ({"data": []}, InvalidValue, "data holds no batches"),
        ({"data": 3}, InvalidType, "data is a int"),
        ({"data": [3]}, InvalidType, "a batch is a int"),
        ({"data": TensorDataset(torch.zeros(3, 2, 60))}, InvalidType, r"DataLoader\(data, batch_size=32\)"),
        ({"time_dim": 1}, InvalidValue, "is the channel axis of '0'"),
    ],
)
def test_what_cannot_be_searched_is_refused(model, change, error, message):
    arguments = {"data": torch.randn(3, 2, 60), "layer": "2", "k": 2, **change}
    with pytest.raises(error, match=message):
        top(model, **arguments)


def test_a_layer_without_a_time_axis_is_refused():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Conv1d(4, 2, 1))
    with pytest.raises(Unsupported, match="'2' has no time axis"):
        top(model, torch.zeros(2, 1, 20), "2", 1)


def test_a_window_of_an_input_that_is_not_there_is_refused(model):
    hit = max(top(model, torch.randn(5, 2, 60), "2", 5), key=lambda hit: hit.sample)
    with pytest.raises(OutOfRange, match=f"sample {hit.sample}, but x holds 1 input"):
        hit.window(torch.zeros(1, 2, 60))
    with pytest.raises(InvalidType, match=r"x has shape \(\), but one input has 2 axes"):
        hit.window(torch.zeros(60))


def test_the_example_recovers_the_planted_motif(capsys, monkeypatch):
    monkeypatch.setattr(convtap, "top", top, raising=False)
    spec = importlib.util.spec_from_file_location("motifs", EXAMPLES / "motifs.py")
    motifs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(motifs)
    motifs.main()
    printed = capsys.readouterr().out
    assert "position frequency matrix" in printed
    consensus = printed.split("consensus ")[1].split(",")[0]
    assert motifs.MOTIF in consensus
    rows = [line.split() for line in printed.splitlines() if line.strip()[:2] in ("A ", "C ", "G ", "T ")]
    columns = zip(*([float(share) for share in row[1:]] for row in rows), strict=True)
    assert all(sum(column) == pytest.approx(1, abs=0.03) for column in columns)
