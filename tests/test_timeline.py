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

from convtap import AmbiguousCall, CoverageWarning, LayerNotFound, Unsupported, capture
from convtap._errors import InvalidType, InvalidValue, OutOfRange
from convtap._time.timeline import timeline
from tests.models import ReusedConv

# -- references

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)


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


def overlap_add(x):
    windows = x.unfold(-1, 8, 4).permute(0, 1, 3, 2).flatten(1, 2)
    return F.fold(windows, (1, (windows.shape[-1] - 1) * 4 + 8), (1, 8), stride=(1, 4))[:, :, 0]


def mixed_windows(x):
    """Each window is multiplied with a matrix of all its places, and then added to the others again."""
    windows = x.unfold(-1, 8, 4).permute(0, 1, 3, 2).flatten(1, 2)
    windows = torch.ones(8, windows.shape[1], dtype=x.dtype) @ windows
    return F.fold(windows, (1, (windows.shape[-1] - 1) * 4 + 8), (1, 8), stride=(1, 4))[:, :, 0]


def whole(x, size):
    return x[..., : x.shape[-1] // size * size]


@pytest.mark.parametrize(
    ("function", "channels", "after"),
    [
        # framing: windows as frames, their places as channels
        (lambda x: x[:, 0].unfold(-1, 8, 4).transpose(1, 2), 1, 8),
        (lambda x: x.unfold(-1, 8, 4).permute(0, 1, 3, 2).flatten(1, 2), 2, 16),
        (lambda x: x.unfold(-1, 8, 4).permute(0, 3, 1, 2).flatten(1, 2), 2, 16),
        (lambda x: x[:, 0].unfold(-1, 8, 12).transpose(1, 2), 1, 8),
        (lambda x: F.unfold(x[:, :, None], (1, 8), stride=(1, 4)), 2, 16),
        (lambda x: F.unfold(x[..., None], (6, 1), stride=(3, 1), padding=(2, 0), dilation=(2, 1)), 2, 12),
        # time folded into channels
        (lambda x: whole(x, 4).unflatten(-1, (-1, 4)).permute(0, 1, 3, 2).flatten(1, 2), 2, 8),
        (lambda x: whole(x, 4).unflatten(-1, (-1, 4)).permute(0, 3, 1, 2).flatten(1, 2), 2, 8),
        (lambda x: torch.cat([whole(x, 2)[..., ::2], whole(x, 2)[..., 1::2]], 1), 2, 4),
        pytest.param(
            lambda x: F.pixel_unshuffle(whole(x, 2)[:, :, None].expand(-1, -1, 2, -1), 2)[:, :, 0],
            2,
            8,
            marks=pytest.mark.skipif(OLD, reason="torch 2.6 and 2.8 copy in another way, and the layer is unknown"),
        ),
        # and out of them
        (lambda x: F.pixel_shuffle(x[:, :, None], 2).flatten(1, 2), 4, 2),
        (lambda x: x.unflatten(1, (2, 2)).transpose(2, 3).flatten(2), 4, 2),
        # overlap-add
        (overlap_add, 2, 2),
        (mixed_windows, 2, 1),
        (lambda x: F.fold(x, (1, (x.shape[-1] - 1) * 2 + 4), (1, 4), stride=(1, 2))[:, :, 0], 8, 2),
        (lambda x: F.fold(x, (x.shape[-1] * 3, 1), (5, 1), padding=(1, 0), stride=(3, 1))[..., 0], 10, 2),
        # interleaved, and stacked in other ways
        (lambda x: torch.stack([x, x], -1).flatten(-2), 2, 2),
        (lambda x: torch.stack([y := torch.stack([x, x], -1).flatten(-2), y], -1).flatten(-2), 2, 2),
        (lambda x: torch.stack([x[:, :1, 1:-1], F.avg_pool1d(x[:, 1:], 3, 1)], -1).flatten(-2), 2, 1),
        (lambda x: torch.stack([x[:, :1, 3:], x[:, 1:, :-3]], 2).transpose(2, 3).reshape(1, 1, -1), 2, 1),
        (lambda x: torch.stack([x[:, :1, 3:], x[:, 1:, :-3]], -1).sum(-1), 2, 1),
        (lambda x: torch.stack([x[:, :, 3:], x[:, :, :-3]], 1).flatten(1, 2), 2, 4),
        (lambda x: torch.stack([x, torch.zeros_like(x)], -1).flatten(-2), 2, 2),
        (lambda x: torch.stack([x[..., 3:], x[..., :-3]], 1).sum(1) * x[..., 3:], 2, 2),
        # frames at the ends again
        (lambda x: torch.cat([x, x[..., -1:]], -1), 2, 2),
        (lambda x: torch.cat([x[..., :1], x, x[..., -1:]], -1), 2, 2),
    ],
)
def test_spans_after_framing_folding_and_interleaving_equal_the_gradients(function, channels, after):
    model = nn.Sequential(nn.Conv1d(1, channels, 3, padding=1), Then(function), nn.Conv1d(after, 1, 2))
    assert_spans(model, 60)
    assert_lengths(model, timeline(model, torch.zeros(1, 1, 60).double())["2"], (60, 61, 55, 90))


def test_frames_of_the_input_itself_have_a_step_and_a_field():
    class Framed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(400, 4, 3)

        def forward(self, x):
            return self.conv(x.unfold(-1, 400, 160).transpose(1, 2))

    model = Framed()
    layer = timeline(model, torch.zeros(1, 4000))["conv"]
    assert (layer.stride, layer.receptive_field, layer.start) == (160, 400 + 2 * 160, 0)
    assert layer.valid_lengths([4000, 1200]).tolist() == [(4000 - 400) // 160 + 1 - 2, (1200 - 400) // 160 + 1 - 2]
    assert_spans(nn.Sequential(Then(lambda x: x[:, 0].unfold(-1, 8, 4).transpose(1, 2)), nn.Conv1d(8, 2, 2)), 60, "1")


def test_depthwise_channels_that_hold_frames_stay_frames_and_other_groups_are_unknown():
    class Grouped(nn.Module):
        def __init__(self, groups) -> None:
            super().__init__()
            self.before, self.conv = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(4, 8, 1, groups=groups)
            self.out = nn.Conv1d(2, 1, 2)

        def forward(self, x):
            y = self.conv(self.before(x)[:, 0].unfold(-1, 4, 4).transpose(1, 2))
            return self.out(y.unflatten(1, (4, 2)).permute(0, 2, 3, 1).flatten(2))

    assert_spans(Grouped(4), 60, "out")
    assert "2 groups of channels hold frames" in timeline(Grouped(2), torch.zeros(1, 1, 60))["conv"].unknown


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.roll(1, -1),
        lambda x: x.roll(-3, -1),
        lambda x: x + x.roll(2, -1),
        lambda x: torch.cat([x[..., -2:], x[..., :-2]], -1),
        lambda x: torch.cat([x[..., -3:], x, x[..., :3]], -1),
        lambda x: F.pad(x, (4, 4), mode="circular"),
        lambda x: F.pad(x, (6, 3), mode="reflect"),
        lambda x: F.pad(x, (6, 3), mode="replicate"),
    ],
)
def test_frames_that_see_no_padding_see_their_span_whatever_the_padding_is_filled_with(function):
    model = positive(after(function))
    x = torch.rand(1, 1, 60, dtype=torch.float64) + 0.5
    layer, spans = timeline(model, x)["2"], gradient_spans(model, x, "2")
    assert len(layer.unpadded) >= len(spans) - 20
    assert [spans[t] for t in layer.unpadded] == [layer.span(t) for t in layer.unpadded]
    # of the others, some see what the padding is filled with, which lies elsewhere
    others = [t for t in range(len(spans)) if t not in layer.unpadded]
    assert any(spans[t][0] < layer.span(t)[0] or spans[t][1] > layer.span(t)[1] for t in others)
    assert_lengths(model, layer, (60, 61, 55, 90))


def test_a_roll_by_half_of_the_length_has_places_for_this_length_only():
    layer = timeline(after(lambda x: x.roll(x.shape[-1] // 2, -1)), torch.zeros(1, 1, 60))["2"]
    assert any("lie elsewhere" in note for note in layer.notes)


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


class Windows(nn.Module):
    """An encoder of windows in the batch, and a convolution over what it makes of them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.before, self.inner = nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 3, 3)
        self.embed, self.out = nn.Linear(16, 3), nn.Conv1d(3, 2, 2)
        self.function = function

    def forward(self, x):
        return self.out(self.function(self, self.before(x)))


def averaged(model, y):
    windows = y.unfold(-1, 8, 4).transpose(1, 2)
    return model.inner(windows.flatten(0, 1)).mean(-1).unflatten(0, windows.shape[:2]).transpose(1, 2)


def embedded(model, y):
    return model.embed(y.unfold(-1, 8, 4).transpose(1, 2).flatten(2)).transpose(1, 2)


def patched(model, y):
    return model.embed(whole(y, 8).transpose(1, 2).reshape(len(y), -1, 16)).transpose(1, 2)


def padded_each(model, y):
    windows = F.pad(whole(y, 8).unflatten(-1, (-1, 8)).transpose(1, 2).flatten(0, 1), (1, 1))
    return model.inner(windows).unflatten(0, (len(y), -1)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("function", "stride", "field"), [(averaged, 4, 14), (embedded, 4, 14), (patched, 8, 18), (padded_each, 1, 6)]
)
def test_windows_in_the_batch_or_in_features_are_put_together_again(function, stride, field):
    model = positive(Windows(function))
    for batch in (1, 3):
        layer = timeline(model, torch.rand(batch, 1, 64).double())["out"]
        assert (layer.stride, layer.receptive_field, layer.unknown) == (stride, field, None)
    spans = gradient_spans(model, torch.rand(1, 1, 64).double(), "out")
    assert len(spans) == layer.frames
    assert [spans[t] for t in layer.unpadded] == [layer.span(t) for t in layer.unpadded]
    assert all(layer.span(t)[0] <= first and stop <= layer.span(t)[1] for t, (first, stop) in enumerate(spans))
    assert len(layer.unpadded) == (0 if function is padded_each else len(spans) - 2)


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
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: x[:, torch.randperm(x.shape[1])], "index"),
        (lambda x: x + x[:, :1], "one frame is broadcast to 19"),
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


ATTENTIONS = {
    "queries first": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "keys first": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(1)).mT,
    "keys first, transposed back": lambda q, k, v: (k @ q.mT).softmax(1).mT @ v,
    "scaled, with a bias": lambda q, k, v: ((q / 2) @ k.mT + torch.arange(q.shape[1])).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", q, k).softmax(2), v),
    "einsum, keys first": lambda q, k, v: torch.einsum(
        "bji,bjc->bic", torch.einsum("bjc,bic->bji", k, q).softmax(1), v
    ),
    "einsum, channels first": lambda q, k, v: (
        torch.einsum("bcj,bji->bci", v.mT, torch.einsum("bcj,bci->bji", k.mT, q.mT).softmax(1)).mT
    ),
    "two heads": lambda q, k, v: torch.einsum(
        "bhij,bjhc->bihc",
        torch.einsum("bihc,bjhc->bhij", q.unflatten(-1, (2, 2)), k.unflatten(-1, (2, 2))).softmax(-1),
        v.unflatten(-1, (2, 2)),
    ).flatten(2),
    "normalized by hand": lambda q, k, v: ((s := (q @ k.mT).exp()) / s.sum(-1, keepdim=True)) @ v,
    "normalized by hand, keys first": lambda q, k, v: (v.mT @ ((s := (k @ q.mT).exp()) / s.sum(1, keepdim=True))).mT,
    "linear": lambda q, k, v: q.softmax(-1) @ (k.softmax(1).mT @ v),
    "linear, einsum": lambda q, k, v: torch.einsum("bic,bcd->bid", q, torch.einsum("bjc,bjd->bcd", k, v)),
    "scaled dot product": lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0],
    "with transposes": lambda q, k, v: (
        F.scaled_dot_product_attention(*(one.unflatten(-1, (2, 2)).transpose(1, 2) for one in (q, k, v)))
        .transpose(1, 2)
        .flatten(2)
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_behind_an_attention_in_any_order_frames_keep_their_places_and_see_everything(name):
    function = ATTENTIONS[name]
    model = Mixed(Then(lambda x: function(x, x + 1, x * 2)))
    layer = timeline(model, torch.rand(2, 1, 40))["behind"]
    assert (layer.unknown, layer.dim, layer.frames, layer.stride) == (None, -1, 19, 2)
    assert layer.receptive_field == math.inf
    assert layer.valid_lengths([40, 20]).tolist() == [19, 9]
    assert_lengths(model, layer, (40, 41, 20))
    x = torch.rand(1, 1, 40, dtype=torch.float64)
    # of 40 samples, a kernel of 4 every 2 samples reaches all
    assert gradient_spans(model.double(), x, "behind") == [(0, 40)] * 19


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_is_followed_in_either_layout(batch_first):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y = self.heads(x, x, x)[0]
            return y if batch_first else y.transpose(0, 1)

    layer = timeline(Mixed(Heads()), torch.rand(2, 1, 40))["behind"]
    assert (layer.unknown, layer.dim, layer.receptive_field) == (None, -1, math.inf)
    assert layer.valid_lengths([40, 20]).tolist() == [19, 9]


def test_attention_over_channels_keeps_the_frames_that_the_values_have():
    def across_channels(x):
        q = x.mT[:, None]  # (B, 1, C, T): the product sums over time
        return F.scaled_dot_product_attention(q, q, q)[:, 0].mT

    layer = timeline(Mixed(Then(across_channels)), torch.rand(2, 1, 40))["behind"]
    assert (layer.unknown, layer.dim, layer.frames, layer.receptive_field) == (None, -1, 19, math.inf)


def test_scores_of_frames_against_frames_are_loud():
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scores, self.out = nn.Conv1d(1, 4, 3), Then(lambda x: x.mT @ x), nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.out(self.scores(self.conv(x))[:, None])

    model, x = Scores(), torch.rand(2, 1, 40)
    times = timeline(model, x)
    assert "frames on two axes" in times["scores"].unknown
    assert "frames on two axes" in times["out"].unknown
    with torch.no_grad(), capture(model, ["scores", "conv"]) as acts:
        model(x)
    with pytest.raises(Unsupported, match="'scores' is unknown: its output .* has frames on two axes"):
        acts.samples(lengths=[40, 20], timeline=times)


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        # the frames come back after all of them were mixed into something without a time axis
        (
            Then(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), dim=1, n=x.shape[1])),
            "from frequencies back to frames",
        ),
        (Then(lambda x: x.mean(1, keepdim=True).expand(-1, x.shape[1], -1)), "for two lengths"),
        (Then(lambda x: x.new_ones(x.shape[1], 1) @ x.sum(1, keepdim=True)), "for two lengths"),
    ],
)
def test_frames_that_come_back_from_nowhere_are_loud_and_never_kept_with_their_padding(middle, why):
    model, x = Mixed(middle), torch.rand(2, 1, 40)
    times = timeline(model, x)
    assert why in times["behind"].unknown
    with torch.no_grad(), capture(model, "behind") as acts:
        model(x)
    with pytest.raises(Unsupported, match="'behind' is unknown"):
        acts.samples(lengths=[40, 20], timeline=times)


# -- what does not come from the signal


class Detour(nn.Module):
    """Something between two convolutions that leaves torch, and comes back."""

    def __init__(self, detour) -> None:
        super().__init__()
        self.before, self.behind, self.last = nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 1)
        self.detour, self.window = detour, [torch.ones(2, 1)]

    def forward(self, x):
        return self.last(self.behind(self.detour(self.before(x)) * self.window[0]))


@pytest.mark.parametrize(
    ("detour", "by"),
    [
        (lambda y: torch.from_numpy(y.detach().cpu().numpy() * 2), "numpy"),
        (lambda y: torch.from_numpy(y.detach().numpy()), "numpy"),
        (lambda y: torch.as_tensor(y.detach().numpy() + 1), "numpy"),
        (lambda y: torch.frombuffer(bytearray(y.detach().numpy().tobytes()), dtype=y.dtype).view(y.shape), "numpy"),
        (lambda y: torch.tensor(y.tolist()), "tolist"),
        (lambda y: y.new_tensor(y.tolist()), "tolist"),
        (lambda y: torch.from_dlpack(y.detach()), "__dlpack__"),
        (lambda y: torch.tensor([[[float(v) for v in row] for row in rows] for rows in y.detach()]), "item"),
        (lambda y: (out := torch.empty(y.shape), out.numpy().__setitem__(..., y.detach().numpy()))[0], "numpy"),
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_layers_behind_a_detour_through_numpy_have_a_line_that_says_so(detour, by, fixed):
    def checked(y):
        if fixed and y.shape[-1] != 18:
            raise ValueError("this model takes 20 samples")
        return detour(y)

    times = timeline(Detour(checked), torch.rand(1, 1, 20))
    assert list(times) == ["before", "behind", "last"]
    assert times["before"].unknown is None
    for name in ("behind", "last"):
        assert f"left torch in {by}" in times[name].unknown or "for two lengths" in times[name].unknown
    assert "unknown: " in str(times)


def test_the_data_of_a_tensor_is_a_view_of_it():
    layer = timeline(Detour(lambda y: y.data), torch.rand(1, 1, 20))["behind"]
    assert (layer.unknown, layer.receptive_field) == (None, 5)


class Speaker(nn.Module):
    """Two inputs with a time axis each, and a layer that sees neither."""

    def __init__(self) -> None:
        super().__init__()
        self.speech, self.text, self.both = nn.Conv1d(1, 2, 3, 2), nn.Conv1d(4, 2, 5), nn.Conv1d(2, 2, 1)
        self.constant, self.tokens = nn.Conv1d(2, 2, 1), nn.Parameter(torch.rand(1, 2, 7))

    def forward(self, wave, letters, gain=None):
        letters = self.text(F.one_hot(letters, 4).float().transpose(1, 2))
        return self.both(self.speech(wave) + letters.mean(-1, keepdim=True)) + self.constant(self.tokens).mean()


SPOKEN = (torch.rand(1, 1, 50), torch.zeros(1, 30, dtype=torch.long))


def test_layers_of_another_input_have_a_line_that_names_it():
    times = timeline(Speaker(), SPOKEN)
    assert list(times) == ["text", "speech", "both", "constant"]
    assert times.signal == "0"
    assert (times["speech"].frames, times["both"].frames) == (24, 24)
    assert "not depend on the signal '0', but on the input '1'" in times["text"].unknown
    assert "signal=1" in str(times)
    with pytest.raises(Unsupported, match="'constant' has no time axis: it is constant"):
        times["constant"].span(0)


@pytest.mark.parametrize("signal", ["letters", 1])
def test_the_signal_is_chosen_by_name_or_position(signal):
    times = timeline(Speaker(), SPOKEN, signal=signal)
    assert (times.signal, times["text"].frames, times["text"].receptive_field) == ("1", 26, 5)
    assert "on the input '0'" in times["speech"].unknown
    by_name = timeline(Speaker(), dict(zip(("wave", "letters"), SPOKEN, strict=True)), signal=signal)
    assert (by_name.signal, by_name["text"].frames) == ("letters", 26)


@pytest.mark.parametrize(
    ("signal", "error", "message"),
    [
        (
            "leters",
            InvalidValue,
            r"signal='leters' names no tensor .*wave \(1, 1, 50\), letters \(1, 30\).*mean 'letters'",
        ),
        (2, InvalidValue, "signal=2 names no tensor"),
        (0.5, InvalidType, "signal is a float. Pass the name or the position"),
    ],
)
def test_a_signal_that_is_not_there_is_refused(signal, error, message):
    with pytest.raises(error, match=message):
        timeline(Speaker(), dict(zip(("wave", "letters"), SPOKEN, strict=True)), signal=signal)


class Codec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, 2, 8, stride=4), nn.ConvTranspose1d(2, 1, 8, stride=4)

    def encode(self, x, *, scale=1.0):
        return self.encoder(x * scale)

    def forward(self, x):
        return self.decoder(self.encode(x))


def test_a_method_is_followed_and_a_wrong_name_is_refused_with_the_near_one():
    from convtap import list_layers

    model, x = Codec(), torch.rand(1, 1, 80)
    assert list(timeline(model, x)) == ["encoder", "decoder"]
    assert list(timeline(model, x, method="encode")) == ["encoder"]
    assert list(timeline(torch.compile(model, backend="eager"), x, method="encode")) == ["encoder"]
    assert timeline(model, {"x": x, "scale": 2.0}, method="encode")["encoder"].frames == 19
    assert [row.used for row in list_layers(model, example=x, method="encode")] == ["module × 1"]
    for call in (timeline, lambda *args, **more: list_layers(args[0], example=args[1], **more)):
        with pytest.raises(InvalidValue, match=r"method='encod' is not a method of Codec\. Did you mean 'encode'\?"):
            call(model, x, method="encod")
        with pytest.raises(InvalidType, match="method is a int"):
            call(model, x, method=3)


def test_branches_of_different_strides_are_unknown():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halved = nn.Conv1d(1, 1, 2, stride=2)
            self.out = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            half = self.halved(x)
            return self.out(half + x[..., : half.shape[-1]])

    assert "2 and 1 samples per frame" in timeline(Broken(), torch.zeros(1, 1, 40))["out"].unknown


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
    with pytest.raises(InvalidValue, match=r"is the channel axis of 'conv'.*\(2, 3, 41\).*time_dim=1"):
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
    with pytest.raises(Unsupported, match=r"for 60 samples is not known.*slice.*example of 60 samples"):
        layer.valid_lengths([60])


def test_samples_are_cut_to_their_valid_frames_over_several_passes():
    model = nn.Sequential(nn.Conv1d(1, 4, 10, stride=5), nn.ReLU(inplace=True), nn.Conv1d(4, 2, 3, padding=1))
    times = timeline(model, torch.zeros(1, 1, 1000))
    batches = [torch.randn(3, 1, 80), torch.randn(2, 1, 60)]
    with capture(model) as acts:
        for batch in batches:
            model(batch)
    with pytest.warns(CoverageWarning, match="same padding: the last frame of '2'"):
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
    with pytest.warns(CoverageWarning, match=r"mean in '\(root\)': every frame of 'gate'"):
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
        ([80], InvalidValue, "lengths has 1 number for 2 inputs"),
        ([80, 81], InvalidValue, "lengths holds 81, but the input has 80 samples"),
        ([80, -1], InvalidValue, "lengths holds -1"),
        ([80, 1.5], InvalidType, "lengths holds 1.5, which is not a whole number"),
        ("80", InvalidType, "lengths is a str"),
        (80, InvalidType, "lengths is a int"),
        (torch.zeros(2, 1), InvalidValue, r"lengths has shape \(2, 1\)"),
        (None, InvalidValue, "lengths= is missing. Pass lengths= and timeline="),
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
    with pytest.raises(InvalidValue, match="from the model that ran"):
        acts.samples(lengths=[80, 60], timeline=timeline(other, torch.zeros(1, 1, 100)))


def test_something_that_is_no_timeline_is_refused():
    acts, _ = two()
    with pytest.raises(InvalidType, match="timeline is a dict"):
        acts.samples(lengths=[80, 60], timeline={})
    with pytest.raises(InvalidValue, match="timeline= is missing. Pass lengths= and timeline="):
        acts.samples(lengths=[80, 60])


@pytest.mark.parametrize(
    ("example", "time_dim", "error", "message"),
    [
        (torch.zeros(1, 1, 40), 3, OutOfRange, r"time_dim=3 is not an axis of the input.*\(1, 1, 40\)"),
        (torch.zeros(1, 1, 40), -4, OutOfRange, "time_dim=-4 is not an axis"),
        (torch.tensor(1.0), -1, OutOfRange, "not an axis of the input"),
        (torch.zeros(1, 1, 40), "time", InvalidType, "time_dim is a str"),
        (torch.zeros(1, 1, 0), -1, InvalidValue, "has no samples"),
        ({}, -1, InvalidValue, "holds no tensor, so it has no time axis"),
        ([torch.zeros(1, 1, 40)], -1, InvalidType, "example is a list"),
        (torch.zeros(4, 1, 40), 0, InvalidValue, "is the batch axis of"),
        (torch.zeros(1, 1, 40), 1, InvalidValue, "is the channel axis of"),
    ],
)
def test_wrong_examples_are_refused(example, time_dim, error, message):
    with pytest.raises(error, match=message):
        timeline(nn.Sequential(nn.Conv1d(1, 1, 3)), example, time_dim=time_dim)


def test_wrong_names_frames_and_rates_are_refused():
    _, times = two()
    with pytest.raises(LayerNotFound, match=r"no layer is named '3'.*The timeline has 0, 2"):
        times["3"]
    with pytest.raises(LayerNotFound, match="0 is not a layer's name. Pass one of: 0, 2"):
        times[0]
    with pytest.raises(OutOfRange, match="frame -1 does not exist"):
        times["0"].span(-1)
    with pytest.raises(InvalidType, match=r"frame 0\.5 is a float. Pass an int"):
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


def test_no_run_of_a_layer_is_lost_to_a_layer_that_is_named_like_one():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(2, 2, 3)
            self.add_module("a#0", nn.Conv1d(2, 2, 5))

        def forward(self, x):
            return self.get_submodule("a#0")(self.a(self.a(x)))

    times = timeline(Named(), torch.zeros(1, 2, 50))
    assert {key: times[key].receptive_field for key in times} == {"a##0": 3, "a##1": 5, "a#0": 9}
    assert [time.receptive_field for time in times.calls("a")] == [3, 5]
