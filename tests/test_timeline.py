"""The time axis: held against gradients, against the models' own lengths, and against hand computation."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import AmbiguousCall, LayerNotFound, Unsupported, capture
from convtap._errors import InvalidType, InvalidValue, OutOfRange
from convtap._time.timeline import timeline
from tests.models import ReusedConv

# -- references


def positive(model: nn.Module) -> nn.Module:
    """The model in float64 with positive weights, so that no two paths of a gradient cancel."""
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.abs() + 0.1
    return model


def gradient_spans(model, x, name, time_dim=-1, out_dim=-1):
    """For each frame of a layer, the first input sample with a gradient, and the one after the last; None if none has."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
    x = x.detach().requires_grad_()
    model(x)
    handle.remove()
    frames = kept[-1].movedim(out_dim, 0)
    spans = []
    for frame in frames:
        (gradient,) = torch.autograd.grad(frame.sum(), x, retain_graph=True, allow_unused=True)
        seen = gradient.movedim(time_dim, 0).flatten(1).abs().sum(1).nonzero().flatten().tolist()
        spans.append((seen[0], seen[-1] + 1) if seen else None)
    return spans


def assert_spans(model, length, *names, channels=1):
    """Frames that see no padding see exactly ``span``; all others see nothing outside of it."""
    model = positive(model)
    x = torch.rand(1, channels, length, dtype=torch.float64) + 0.5
    times = timeline(model, x)
    for name in names or [name for name in times if "#" not in name]:
        layer = times[name]
        spans = gradient_spans(model, x, name)
        assert len(spans) == layer.frames
        assert len(layer.unpadded) > 0
        for t, seen in enumerate(spans):
            first, stop = layer.span(t)
            if t in layer.unpadded:
                assert seen == (first, stop), (name, t)
            elif seen is not None:
                assert (max(first, seen[0]), min(stop, seen[1])) == seen, (name, t)


def assert_lengths(model, layer, lengths, channels=1):
    """The counts are those of the model itself, run on inputs of these lengths."""
    for length in lengths:
        kept = []
        handle = model.get_submodule(layer.name).register_forward_hook(lambda module, args, out, k=kept: k.append(out))
        with torch.no_grad():
            model(torch.zeros(1, channels, length, dtype=next(model.parameters()).dtype))
        handle.remove()
        assert layer.valid_lengths([length]).tolist() == [kept[0].shape[-1]], length


# -- models


class Then(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class DilatedTCN(nn.Module):
    """Causal: padded on both sides, and the right end cut off; dilations 1, 2, 4; a residual each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 3, padding=2)
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=2 * d, dilation=d) for d in (1, 2, 4))

    def forward(self, x):
        x = self.first(x)[..., :-2]
        for conv in self.convs:
            y = conv(x)
            x = x + torch.relu(y[:, :, : y.shape[-1] - conv.padding[0]])
        return x


class UNet(nn.Module):
    """Two levels down by 2, up again by transposed convolutions, skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Conv1d(1, 4, 3, padding=1)
        self.down1 = nn.Conv1d(4, 4, 4, stride=2, padding=1)
        self.enc2 = nn.Conv1d(4, 4, 3, padding=1)
        self.down2 = nn.Conv1d(4, 4, 4, stride=2, padding=1)
        self.mid = nn.Conv1d(4, 4, 3, padding=1)
        self.up2 = nn.ConvTranspose1d(4, 4, 2, stride=2)
        self.dec2 = nn.Conv1d(8, 4, 3, padding=1)
        self.up1 = nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1)
        self.dec1 = nn.Conv1d(8, 1, 1)

    def forward(self, x):
        a = F.relu(self.enc1(x))
        b = F.relu(self.enc2(self.down1(a)))
        c = self.mid(self.down2(b))
        u = self.dec2(torch.cat([self.up2(c)[..., : b.shape[-1]], b], dim=1))
        return self.dec1(torch.cat([self.up1(u)[..., : a.shape[-1]], a], dim=1))


class ChannelsLast(nn.Module):
    """Takes (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 5, stride=2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))


def after(function, channels=1):
    """A convolution after something else, in front of which another one stands."""
    return nn.Sequential(nn.Conv1d(1, channels, 3), Then(function), nn.Conv1d(channels, 1, 2))


# -- geometry


def test_stride_field_and_start_of_stacked_convolutions_are_the_textbook_values():
    # r = 1 + 9·1 = 10; then 10 + 2·5 = 20, stride 5·2, start -1·5
    model = nn.Sequential(nn.Conv1d(1, 4, 10, stride=5), nn.ReLU(), nn.Conv1d(4, 4, 3, stride=2, padding=1))
    times = timeline(model, torch.zeros(1, 1, 1000))
    first, second = times["0"], times["2"]
    assert (first.stride, first.receptive_field, first.start, first.frames) == (5, 10, 0, 199)
    assert (second.stride, second.receptive_field, second.start, second.frames) == (10, 20, -5, 100)
    assert second.span(0) == (-5, 15)
    assert second.span(7) == (65, 85)
    assert second.centre(7) == Fraction(65 + 84, 2)
    assert first.unpadded == range(199)
    assert second.unpadded == range(1, 99)  # frame 99 would see frame 199 of the first layer, which has none


@pytest.mark.parametrize("kernel", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (2, 1), (1, 3)])
def test_spans_of_two_convolutions_equal_the_gradients(kernel, stride, padding, dilation):
    layers = [nn.Conv1d(1, 2, kernel, stride, padding, dilation) for _ in range(1)]
    assert_spans(nn.Sequential(*layers, nn.Conv1d(2, 2, 3, 2, 1)), 41)


def test_spans_of_a_dilated_causal_network_equal_the_gradients_and_the_hand_computation():
    model = DilatedTCN()
    times = timeline(model, torch.zeros(1, 1, 40))
    # field 3, then + 2·(1, 2, 4): 5, 9, 17. All of it lies before the frame: it ends with the frame's own sample.
    assert [layer.receptive_field for layer in times.values()] == [3, 5, 9, 17]
    assert [layer.start for layer in times.values()] == [-2, -4, -8, -16]
    assert all(layer.span(20)[1] == 21 for layer in times.values())
    assert_lengths(model, times["convs.2"], (17, 39, 41, 80))
    assert_spans(model, 40)


def test_spans_of_a_unet_equal_the_gradients_and_the_hand_computation():
    model = UNet()
    times = timeline(model, torch.zeros(1, 1, 48))
    strides = {name: layer.stride for name, layer in times.items()}
    assert strides == {
        "enc1": 1, "down1": 2, "enc2": 2, "down2": 4, "mid": 4, "up2": 2, "dec2": 2, "up1": 1, "dec1": 1,
    }  # fmt: skip
    # enc1 3 · down1 3 + 3·1 = 6 · enc2 6 + 2·2 = 10 · down2 10 + 3·2 = 16 · mid 16 + 2·4 = 24
    fields = {name: layer.receptive_field for name, layer in times.items()}
    assert [fields[name] for name in ("enc1", "down1", "enc2", "down2", "mid")] == [3, 6, 10, 16, 24]
    # A kernel of 2 at stride 2: every frame of ``up2`` sees one frame of ``mid``; frames 2i and 2i + 1 the same one.
    mid, up2 = times["mid"], times["up2"]
    assert [up2.span(t) for t in (6, 7, 8)] == [mid.span(3), mid.span(3), mid.span(4)]
    assert_lengths(model, times["dec1"], (48, 52, 100))
    assert_spans(model, 48)


def test_a_transposed_convolution_makes_the_stride_and_the_centre_fractions():
    model = nn.Sequential(nn.ConvTranspose1d(1, 2, 4, stride=4), nn.Conv1d(2, 2, 2))
    times = timeline(model, torch.zeros(1, 1, 10))
    assert times["0"].stride == Fraction(1, 4)
    assert [times["0"].span(t) for t in (0, 3, 4, 7)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    # Frames 0 to 3 see sample 0, so on average frame 3/2 lies on it: the centre of frame t is (t - 3/2) / 4.
    assert [times["0"].centre(t) for t in (0, 2)] == [Fraction(-3, 8), Fraction(1, 8)]
    assert times["1"].span(3) == (0, 2)  # frames 3 and 4
    assert times["1"].receptive_field == 2
    assert_spans(model, 10)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"), [(4, 2, 1, 0), (3, 3, 0, 0), (5, 2, 2, 1), (7, 3, 1, 2), (3, 1, 2, 0)]
)
def test_spans_after_transposed_convolutions_equal_the_gradients(kernel, stride, padding, extra):
    up = nn.ConvTranspose1d(2, 2, kernel, stride, padding, extra)
    model = nn.Sequential(nn.Conv1d(1, 2, 3, 2, 1), up, nn.Conv1d(2, 2, 3, 2), nn.Conv1d(2, 1, 2))
    assert_spans(model, 40)
    assert_lengths(model, timeline(model, torch.zeros(1, 1, 40).double())["3"], (39, 41, 57))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.avg_pool1d(x, 3, 2, 1),
        lambda x: F.avg_pool1d(x, 4, 3, ceil_mode=True),
        lambda x: F.pad(x, (3, 1)),
        lambda x: F.pad(x, (-2, -1)),
        lambda x: x[..., 2:-1],
        lambda x: x[..., 1 : x.shape[-1] - 3],
        lambda x: x[..., ::3],
        lambda x: x.unfold(-1, 4, 2).sum(-1),
        lambda x: x.repeat_interleave(3, -1),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: F.interpolate(x, scale_factor=3, mode="linear"),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest"),
        lambda x: torch.cat([x.new_zeros(1, 1, 3), x], -1),
        lambda x: torch.cat([x[..., :10], x[..., 10:]], -1),
        lambda x: torch.cat(x.split(7, -1), -1),
        lambda x: x[..., : x.shape[-1] // 4 * 4].unflatten(-1, (-1, 4)).mean(-1),
        lambda x: x.transpose(1, 2).contiguous().view(-1, 1).view(1, -1, 1).permute(0, 2, 1),
        lambda x: x.squeeze(1).unsqueeze(1) + x,
        lambda x: torch.einsum("bct,cd->bdt", x, torch.ones(1, 1, dtype=x.dtype)),
        lambda x: x.mul_(2).add_(1)[:, :, 1:],
    ],
)
def test_spans_and_counts_after_other_operations_equal_the_gradients_and_the_model(function):
    model = after(function)
    assert_spans(model, 60)
    layer = timeline(model, torch.zeros(1, 1, 60).double())["2"]
    assert_lengths(model, layer, (60, 61, 55, 90))


def test_spans_of_concatenated_and_added_branches_are_their_hull():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Conv1d(1, 2, 3, padding=1)
            self.long = nn.Conv1d(1, 2, 9, padding=4)
            self.late = nn.Conv1d(1, 4, 3)
            self.out = nn.Conv1d(4, 1, 1)

        def forward(self, x):
            both = torch.cat([self.short(x), self.long(x)], 1)
            return self.out(both[..., 2:] + self.late(x))  # frame t of ``late`` sees t, t + 1, t + 2

    assert timeline(Branches(), torch.zeros(1, 1, 30))["out"].span(10) == (8, 17)  # long, at frame 12
    assert_spans(Branches(), 30)


def test_a_write_into_a_buffer_is_followed():
    def shifted(x):
        out = x.new_zeros(1, 1, x.shape[-1] + 2)
        out[:, :, 2:] = x
        return out

    assert timeline(after(shifted), torch.zeros(1, 1, 30))["2"].start == -2
    assert_spans(after(shifted), 30)


def test_a_view_taken_before_a_write_sees_the_write():
    def through_a_view(x):
        out = torch.zeros_like(x)
        early = out.view(1, -1)[:, 3:]
        out.copy_(x)
        return early.unsqueeze(1)

    assert timeline(after(through_a_view), torch.zeros(1, 1, 30))["2"].start == 3
    assert_spans(after(through_a_view), 30)


def test_sub_pixel_shuffle_and_patches_through_a_linear_layer_equal_the_gradients():
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3, padding=1)
            self.embed = nn.Linear(2 * 8, 6)
            self.mix = nn.Conv1d(6, 4, 2)
            self.out = nn.Conv1d(2, 1, 2)

        def forward(self, x):
            patches = self.conv(x).unfold(-1, 8, 4).permute(0, 2, 1, 3).flatten(2)
            y = self.mix(self.embed(patches).transpose(1, 2))
            shuffled = y.view(1, 2, 2, -1).permute(0, 1, 3, 2).reshape(1, 2, -1)
            return self.out(shuffled)

    times = timeline(Patches(), torch.zeros(1, 1, 64))
    assert times["mix"].stride == 4
    assert times["mix"].span(1) == (3, 17)  # patches 1 and 2: 4 … 15, and one more on each side
    assert times["out"].stride == 2
    assert_spans(Patches(), 64)


def test_chunks_have_a_start_of_their_own_and_windows_do_not_move_with_the_length():
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)

        def forward(self, x):
            return [self.conv(x[..., at : at + 20]) for at in (0, 10, 30)]

    times = timeline(Chunked(), torch.zeros(1, 1, 100))
    assert list(times) == ["conv#0", "conv#1", "conv#2"]
    assert [call.start for call in times.calls("conv")] == [0, 10, 30]
    # An input of 45 samples fills two windows, and half of the third: 20, 20 and 15 samples.
    assert [call.valid_lengths([45])[0].item() for call in times.calls("conv")] == [18, 18, 13]
    with pytest.raises(AmbiguousCall, match=r"'conv' ran 3 times.*timeline\.calls\('conv'\)"):
        times["conv"]


def test_segments_in_a_batch_are_counted_and_have_no_single_length():
    class Segmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.within = nn.Conv1d(1, 2, 3)

        def forward(self, x):
            return self.within(x.view(-1, 1, 20))

    layer = timeline(Segmented(), torch.zeros(1, 1, 100))["within"]
    assert (layer.segments, layer.frames, layer.span(4)) == (5, 18, (4, 7))
    with pytest.raises(Unsupported, match="runs on 5 segments of 18 frames"):
        layer.valid_lengths([100])


def test_interpolation_with_fixed_size_follows_the_other_branch():
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv1d(1, 2, 2, stride=2)
            self.out = nn.Conv1d(3, 1, 1)

        def forward(self, x):
            up = F.interpolate(self.down(x), size=x.shape[-1])
            return self.out(torch.cat([up, x], 1))

    layer = timeline(Resized(), torch.zeros(1, 1, 40))["out"]
    assert (layer.stride, layer.span(7)) == (1, (6, 8))
    assert layer.valid_lengths([40, 38, 36]).tolist() == [40, 38, 36]


# -- what has no receptive field of its own


class Mixed(nn.Module):
    """Something between two convolutions, over (B, T, C)."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.before = nn.Conv1d(1, 4, 4, stride=2)
        self.middle = middle
        self.behind = nn.Conv1d(4, 1, 1)

    def forward(self, x):
        y = self.middle(self.before(x).transpose(1, 2))
        y = y[0] if isinstance(y, tuple) else y
        return self.behind(y.transpose(1, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x)


def _scaled(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def _by_hand(x):
    return (x @ x.transpose(1, 2)).softmax(-1) @ x


@pytest.mark.parametrize(
    ("middle", "by"),
    [
        (nn.LSTM(4, 4, batch_first=True), "lstm"),
        (nn.GRU(4, 2, batch_first=True, bidirectional=True), "gru"),
        (nn.RNN(4, 4, batch_first=True), "rnn_tanh"),
        (Attention(), "bmm"),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "attention|bmm"),
        (Then(_scaled), "scaled_dot_product_attention"),
        (Then(_by_hand), "bmm"),
        (Then(lambda x: x.cumsum(1)), "cumsum"),
    ],
)
def test_recurrence_and_attention_make_the_receptive_field_the_whole_input(middle, by):
    times = timeline(Mixed(middle), torch.zeros(2, 1, 40))
    layer = times["behind"]
    assert layer.receptive_field == math.inf
    assert layer.span(3) == (0, 40)
    assert (layer.stride, layer.centre(1)) == (2, Fraction(7, 2))  # the frames keep their places
    assert layer.valid_lengths([40, 20]).tolist() == [19, 9]
    assert not times["before"].whole
    assert "whole input" in str(times)
    assert any(name in reason for reason in layer.whole for name in by.split("|"))


@pytest.mark.parametrize(
    "middle",
    [
        Then(lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)),
        Then(lambda x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2)),
        Then(lambda x: F.layer_norm(x, x.shape[1:])),
        Then(lambda x: x * x.mean(1, keepdim=True).sigmoid()),
        Then(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)),
        Then(lambda x: x * x.softmax(1)),
    ],
)
def test_statistics_over_time_leave_the_convolutional_field_and_are_named(middle):
    times = timeline(Mixed(middle), torch.rand(2, 1, 40))
    layer = times["behind"]
    assert (layer.receptive_field, layer.stride, layer.span(3)) == (4, 2, (6, 10))
    assert layer.statistics
    assert not times["before"].statistics
    assert "not in the receptive field: statistics over time by" in str(times)


@pytest.mark.parametrize("middle", [nn.LayerNorm(4), nn.Linear(4, 4), nn.Sequential(nn.GELU(), nn.Dropout(0.5))])
def test_what_works_on_each_frame_alone_leaves_no_remark(middle):
    layer = timeline(Mixed(middle), torch.zeros(2, 1, 40))["behind"]
    assert (layer.receptive_field, layer.statistics, layer.whole, layer.unknown) == (4, (), (), None)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.flip(1), "flip"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: x[:, torch.randperm(x.shape[1])], "index"),
        (lambda x: x + x[:, :1], "one frame is given to 19"),
        (lambda x: torch.stack([x[:, i] for i in range(x.shape[1])], 1), "select"),
    ],
)
def test_an_operation_that_is_not_followed_makes_the_axis_unknown_and_says_which(function, why):
    layer = timeline(Mixed(Then(function)), torch.zeros(2, 1, 40))["behind"]
    assert layer.unknown is not None
    assert why in layer.unknown
    with pytest.raises(Unsupported, match=f"time axis of 'behind' is unknown: .*{why}"):
        layer.span(0)
    with pytest.raises(Unsupported, match="unknown"):
        layer.valid_lengths([40])


def test_branches_of_different_strides_are_unknown():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halved = nn.Conv1d(1, 1, 2, stride=2)
            self.out = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            half = self.halved(x)
            return self.out(half + x[..., : half.shape[-1]])

    assert "2 and 1 samples a frame" in timeline(Broken(), torch.zeros(1, 1, 40))["out"].unknown


def test_a_layer_after_pooling_over_all_time_has_no_time_axis():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Conv1d(4, 2, 1))
    layer = timeline(model, torch.zeros(1, 1, 40))["2"]
    assert layer.dim is None
    assert layer.frames is None
    with pytest.raises(Unsupported, match="'2' has no time axis: .*reduced over time"):
        layer.stride  # noqa: B018


# -- how convolutions are called


def test_convolutions_called_as_functions_are_named_as_the_function_tap_names_them():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)
            self.taps = nn.Parameter(torch.randn(2, 2, 5))

        def forward(self, x):
            y = F.conv1d(x, self.conv.weight, stride=2)
            y = F.conv1d(y, self.taps)
            return F.conv1d(y, self.taps * 2)

    model, x = Functional(), torch.zeros(1, 1, 60)
    with capture(model) as acts:
        model(x)
    times = timeline(model, x)
    assert list(times) == list(acts) == ["conv", "taps", "F.conv1d"]
    assert [layer.receptive_field for layer in times.values()] == [3, 11, 19]
    assert [layer.frames for layer in times.values()] == [output.shape[-1] for output in acts.values()]


def test_any_module_can_be_asked_for_and_the_table_shows_the_convolutions():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)))
    times = timeline(model, torch.zeros(1, 1, 20))
    assert list(times) == ["0"]
    assert times["1.1"].stride == 2
    assert times["(root)"].stride == 2
    assert "1.1" in times
    assert "1.2" not in times


def test_a_layer_that_runs_several_times_has_a_line_each():
    times = timeline(ReusedConv(), torch.zeros(1, 4, 20))
    assert [times[f"conv#{i}"].receptive_field for i in range(3)] == [3, 5, 7]
    assert len(times) == 4


@pytest.mark.parametrize("wrap", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1, 1, 40))])
def test_scripted_models_are_followed(wrap):
    model = nn.Sequential(nn.Conv1d(1, 2, 3, stride=2), nn.ReLU(), nn.Conv1d(2, 2, 3))
    layer = timeline(wrap(model), torch.zeros(1, 1, 40))["2"]
    assert (layer.stride, layer.receptive_field) == (2, 7)


def test_compiled_models_are_followed():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, stride=2), nn.ReLU(), nn.Conv1d(2, 2, 3))
    layer = timeline(torch.compile(model, backend="eager"), torch.zeros(1, 1, 40))["2"]
    assert (layer.stride, layer.receptive_field) == (2, 7)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", 2])
def test_padding_modes_have_one_geometry(mode, padding):
    model = nn.Sequential(nn.Conv1d(1, 2, 5, padding=padding, padding_mode=mode), nn.Conv1d(2, 2, 1))
    layer = timeline(model, torch.zeros(1, 1, 40))["1"]
    assert (layer.start, layer.receptive_field, layer.frames) == (-2, 5, 40)
    assert layer.unpadded == range(2, 38)


def test_channels_last_input_needs_and_takes_time_dim():
    times = timeline(ChannelsLast(), torch.zeros(2, 41, 3), time_dim=1)
    assert (times["conv"].dim, times["norm"].dim) == (-1, -2)
    assert times["norm"].valid_lengths([41, 11]).tolist() == [19, 4]
    with pytest.raises(InvalidValue, match=r"makes time the channel axis of 'conv'.*\(2, 3, 41\).*time_dim=1"):
        timeline(ChannelsLast(), torch.zeros(2, 41, 3))


def test_tokens_unbatched_inputs_and_keyword_inputs_are_followed():
    tokens = nn.Sequential(nn.Embedding(5, 4), Then(lambda x: x.transpose(1, 2)), nn.Conv1d(4, 2, 3))
    assert timeline(tokens, torch.zeros(1, 30, dtype=torch.long))["2"].frames == 28
    assert timeline(nn.Conv1d(2, 2, 3), torch.zeros(2, 30))["(root)"].frames == 28

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)

        def forward(self, mask, values):
            return self.conv((values * mask)[:, None])

    example = {"mask": torch.ones(2, 30, dtype=torch.bool), "values": torch.zeros(2, 30)}
    assert timeline(Keywords(), example)["conv"].frames == 28


def test_two_dimensional_convolutions_follow_the_axis_that_is_time():
    model = nn.Sequential(nn.Conv2d(1, 2, (3, 5), stride=(1, 2), padding=(1, 0)), nn.Conv2d(2, 2, 3))
    layer = timeline(model, torch.zeros(1, 1, 8, 50))["1"]
    assert (layer.stride, layer.receptive_field, layer.start) == (2, 9, 0)


def test_short_time_fourier_frames_are_windows():
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(9, 2, 3)

        def forward(self, x):
            spectrum = torch.stft(x, 16, 4, window=torch.hann_window(16), center=True, return_complex=True)
            return self.conv(spectrum.abs())

    layer = timeline(Spectral(), torch.zeros(1, 200))["conv"]
    # Windows of 16 every 4 samples, the first centred on sample 0; three of them: 16 + 2·4.
    assert (layer.stride, layer.receptive_field, layer.start) == (4, 24, -8)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_the_context_it_is_called_in_changes_nothing(context):
    model = nn.Sequential(nn.Conv1d(1, 2, 3, stride=2), nn.Conv1d(2, 2, 3))
    with context():
        layer = timeline(model, torch.zeros(1, 1, 40))["1"]
    assert (layer.stride, layer.receptive_field) == (2, 7)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantized_convolutions_are_followed():
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), nn.Conv1d(1, 4, 3, stride=2), nn.Conv1d(4, 4, 3, padding=1)).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(model, inplace=True)(torch.randn(1, 1, 40))
    quantization.convert(model, inplace=True)
    layer = timeline(model, torch.randn(1, 1, 40))["2"]
    assert (layer.stride, layer.receptive_field, layer.start, layer.frames) == (2, 7, -2, 19)


# -- lengths


def test_masks_are_true_on_valid_frames_and_as_long_as_the_output():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, stride=2))
    layer = timeline(model, torch.zeros(1, 1, 100))["0"]
    mask = layer.mask([20, 9, 2])  # 9, 4 and no frames
    assert mask.tolist() == [[True] * 9, [True] * 4 + [False] * 5, [False] * 9]
    assert layer.mask([9], 20).shape == (1, 9)
    assert layer.mask([]).shape == (0, 0)


def test_seconds_are_the_centres_over_the_sample_rate():
    layer = timeline(nn.Sequential(nn.Conv1d(1, 2, 5, stride=4)), torch.zeros(1, 1, 17))["0"]
    assert torch.equal(layer.seconds(8), torch.tensor([0.25, 0.75, 1.25, 1.75], dtype=torch.float64))


def test_a_window_that_the_program_fixes_is_told_from_one_that_moves():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed, self.moves = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)

        def forward(self, x):
            return self.fixed(x[..., :90]), self.moves(x[..., : x.shape[-1] - 10])

    times = timeline(Both(), torch.zeros(1, 1, 100))
    assert times["fixed"].valid_lengths([200, 50]).tolist() == [90, 50]
    assert times["moves"].valid_lengths([200, 50]).tolist() == [190, 40]


class CroppedToItsInput(nn.Module):
    """A level down and up again, which is longer than the input where that is odd, and is cut to it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(1, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(4, 1, 4, stride=2, padding=1)
        self.out = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        return self.out(self.up(self.down(x))[..., : x.shape[-1]])


class CroppedToItsSkip(CroppedToItsInput):
    def forward(self, x):
        return self.out(self.up(self.down(x))[..., : x.shape[-1]] + x)


class CutToAMultiple(CroppedToItsInput):
    def forward(self, x):
        return self.out(x[..., : x.shape[-1] // 4 * 4])


class FilledUp(CroppedToItsInput):
    """Pads so that whole windows of 6 every 4 samples fit, as streaming encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv1d(1, 1, 6, stride=4)

    def forward(self, x):
        windows = -(-(x.shape[-1] - 4) // 4)
        return self.out(F.pad(x, (2, windows * 4 + 4 - x.shape[-1])))


@pytest.mark.parametrize("model", [CroppedToItsInput(), CroppedToItsSkip(), CutToAMultiple(), FilledUp()])
@pytest.mark.parametrize("example", [64, 65, 66])
def test_numbers_that_depend_on_the_length_are_understood_whatever_the_example(model, example):
    layer = timeline(model, torch.zeros(1, 1, example))["out"]
    assert_lengths(model, layer, (30, 31, 32, 33, 64, 65, 66, 67, 131))


def test_a_number_that_no_pass_explains_is_an_error_and_not_a_guess():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            if x.shape[-1] != 100:
                raise ValueError("this model takes 100 samples")
            return self.conv(x[..., :90])

    layer = timeline(Odd(), torch.zeros(1, 1, 100))["conv"]
    assert layer.valid_lengths([100]).tolist() == [90]
    with pytest.raises(Unsupported, match=r"an input of 60 samples.*slice.*example of 60 samples"):
        layer.valid_lengths([60])


def test_samples_are_cut_to_their_valid_frames_over_several_passes():
    model = nn.Sequential(nn.Conv1d(1, 4, 10, stride=5), nn.ReLU(inplace=True), nn.Conv1d(4, 2, 3, padding=1))
    times = timeline(model, torch.zeros(1, 1, 1000))
    batches = [torch.randn(3, 1, 80), torch.randn(2, 1, 60)]
    with capture(model) as acts:
        for batch in batches:
            model(batch)
    rows = acts.samples(lengths=torch.tensor([80, 50, 9, 60, 30]), timeline=times)
    frames = [15, 9, 0, 11, 5]  # (n - 10) // 5 + 1, and none where the kernel does not fit
    for i, row in enumerate(rows):
        pass_, place = divmod(i, 3)
        whole = torch.nn.functional.conv1d(batches[pass_], model[0].weight, model[0].bias, stride=5)[place]
        assert [tuple(value.shape) for value in row.values()] == [(4, frames[i]), (2, frames[i])]
        assert torch.equal(row["0"], whole[:, : frames[i]])


def test_samples_cut_the_axis_that_is_time_and_leave_outputs_without_one():
    class Pooled(ChannelsLast):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            y = super().forward(x)
            return y * self.gate(y.mean(1)[..., None]).transpose(1, 2)

    model, x = Pooled(), torch.randn(2, 41, 3)
    times = timeline(model, x, time_dim=1)
    with capture(model, ["conv", "norm", "gate"]) as acts:
        model(x)
    rows = acts.samples(lengths=[41, 11], timeline=times)
    assert [tuple(row["norm"].shape) for row in rows] == [(19, 4), (4, 4)]
    assert [tuple(row["conv"].shape) for row in rows] == [(4, 19), (4, 4)]
    assert [tuple(row["gate"].shape) for row in rows] == [(4, 1), (4, 1)]


# -- bad input


def two():
    model = nn.Sequential(nn.Conv1d(1, 4, 10, stride=5), nn.ReLU(), nn.Conv1d(4, 2, 3))
    times = timeline(model, torch.zeros(1, 1, 100))
    with capture(model) as acts:
        model(torch.zeros(2, 1, 80))
    return acts, times


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([80], InvalidValue, "lengths has 1 number, and 2 inputs ran"),
        ([80, 81], InvalidValue, "lengths holds 81, and the input has 80 samples"),
        ([80, -1], InvalidValue, "lengths holds -1"),
        ([80, 1.5], InvalidType, "lengths holds 1.5, which is no whole number"),
        ("80", InvalidType, "lengths is a str"),
        (80, InvalidType, "lengths is a int"),
        (torch.zeros(2, 1), InvalidValue, r"lengths has shape \(2, 1\)"),
        (None, InvalidValue, "samples needs lengths as well"),
    ],
)
def test_wrong_lengths_are_refused(lengths, error, message):
    acts, times = two()
    with pytest.raises(error, match=message):
        acts.samples(lengths=lengths, timeline=times)


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Conv1d(1, 4, 10, stride=2), nn.ReLU(), nn.Conv1d(4, 2, 3)),
        nn.Sequential(nn.Conv1d(1, 5, 10, stride=5), nn.ReLU(), nn.Conv1d(5, 2, 3)),
        nn.Sequential(nn.Sequential(nn.Conv1d(1, 4, 10, stride=5))),
    ],
)
def test_a_timeline_of_another_model_is_refused(other):
    acts, _ = two()
    with pytest.raises(InvalidValue, match="of another model"):
        acts.samples(lengths=[80, 60], timeline=timeline(other, torch.zeros(1, 1, 100)))


def test_something_that_is_no_timeline_is_refused():
    acts, _ = two()
    with pytest.raises(InvalidType, match="timeline is a dict"):
        acts.samples(lengths=[80, 60], timeline={})
    with pytest.raises(InvalidValue, match="samples needs timeline as well"):
        acts.samples(lengths=[80, 60])


@pytest.mark.parametrize(
    ("example", "time_dim", "error", "message"),
    [
        (torch.zeros(1, 1, 40), 3, OutOfRange, r"time_dim=3 is no axis of the input.*\(1, 1, 40\)"),
        (torch.zeros(1, 1, 40), -4, OutOfRange, "time_dim=-4 is no axis"),
        (torch.tensor(1.0), -1, OutOfRange, "no axis of the input"),
        (torch.zeros(1, 1, 40), "time", InvalidType, "time_dim is a str"),
        (torch.zeros(1, 1, 0), -1, InvalidValue, "has no samples"),
        ({}, -1, InvalidValue, "holds no tensor, so it has no time axis"),
        ([torch.zeros(1, 1, 40)], -1, InvalidType, "example is a list"),
        (torch.zeros(4, 1, 40), 0, InvalidValue, "makes time the batch axis of"),
        (torch.zeros(1, 1, 40), 1, InvalidValue, "makes time the channel axis of"),
    ],
)
def test_wrong_examples_are_refused(example, time_dim, error, message):
    with pytest.raises(error, match=message):
        timeline(nn.Sequential(nn.Conv1d(1, 1, 3)), example, time_dim=time_dim)


def test_wrong_names_frames_and_rates_are_refused():
    _, times = two()
    with pytest.raises(LayerNotFound, match=r"no layer is named '3'.*Here: 0, 2"):
        times["3"]
    with pytest.raises(LayerNotFound, match="keys are names"):
        times[0]
    with pytest.raises(OutOfRange, match="no frame -1"):
        times["0"].span(-1)
    with pytest.raises(InvalidType, match=r"a frame is an int, and 0\.5"):
        times["0"].centre(0.5)
    with pytest.raises(InvalidValue, match="sample_rate=0"):
        times["0"].seconds(0)


# -- what it leaves


def test_the_model_the_example_and_the_random_state_are_left_alone():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU(inplace=True), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 1, 30)
    clone, state = x.clone(), torch.random.get_rng_state()
    timeline(model, x)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(x, clone)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_model_that_raises_leaves_no_hooks_and_no_mode():
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)

        def forward(self, x):
            self.conv(x)
            raise RuntimeError("halfway")

    model = Raises()
    with pytest.raises(RuntimeError, match="halfway"):
        timeline(model, torch.zeros(1, 1, 30))
    assert not model.conv._forward_hooks
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0


def test_a_timeline_can_be_pickled_and_holds_no_tensor_of_the_model():
    _, times = two()
    data = pickle.dumps(times)
    again = pickle.loads(data)
    assert again["2"].span(4) == times["2"].span(4)
    assert len(data) < 10_000


def test_the_table_is_what_print_shows():
    model = nn.Sequential(nn.Conv1d(1, 4, 10, stride=5), nn.ReLU(), nn.ConvTranspose1d(4, 4, 10, stride=10))
    assert str(timeline(model, torch.zeros(1, 1, 100))).splitlines() == [
        "layer  stride  receptive field  start  frames",
        "-----  ------  ---------------  -----  ------",
        "0      5                    10      0      19",
        "2      1/2                  10      0     190",
    ]
