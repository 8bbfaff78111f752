"""max_bytes, and errors in what is done with an output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convtap import ConvtapError, MemoryLimitExceeded, capture, list_layers
from convtap._tensors.memory import parse_bytes
from tests.models import AfterConv, FiveConvs

X = torch.randn(2, 1, 30)
SIZES = [2 * channels * 30 * 4 for channels in (4, 4, 8, 8, 8)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (5, 5),
        ("7", 7),
        ("2GB", 2_000_000_000),
        ("1.5 kB", 1500),
        ("512MiB", 512 * 2**20),
        ("1g", 10**9),
        ("3 KiB", 3072),
        ("1_000", 1000),
        (1e6, 1_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text, "max_bytes") == expected


def test_going_over_raises_before_storing_with_who_holds_what_and_the_remedies():
    model = FiveConvs()
    with (
        pytest.raises(
            MemoryLimitExceeded,
            match=r"the output of 'convs.3' needs 1.9 KiB more, but only 5 B of max_bytes=\d+ .*holds: convs.2 1.9 KiB, "
            r"convs.0 960 B, "
            r"convs.1 960 B\. .*reduce=.*dtype=.*fewer layers.*keep='last'.*acts.clear\(\).*larger max_bytes",
        ),
        capture(model, max_bytes=sum(SIZES[:3]) + 5) as acts,
    ):
        model(X)
    assert list(acts) == ["convs.0", "convs.1", "convs.2"]
    assert acts.nbytes == sum(SIZES[:3])


def test_exactly_enough_is_enough():
    model = FiveConvs()
    with capture(model, max_bytes=sum(SIZES)) as acts:
        model(X)
    assert acts.nbytes == sum(SIZES)


def test_keep_last_frees_what_it_replaces():
    model = FiveConvs()
    with capture(model, max_bytes=sum(SIZES), keep="last") as acts:
        for _ in range(5):
            model(X)
    assert acts.nbytes == sum(SIZES)


def test_keep_last_does_not_add_up_over_many_passes():
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1))
    runs_once = nn.Conv1d(1, 1, 1)
    model.append(runs_once)
    first = torch.randn(3, 1, 4)
    with torch.no_grad(), capture(model, keep="last", functional=False) as acts:
        model(first)
        for _ in range(1000):
            model[:2](torch.randn(2, 1, 4))
    assert len(acts._log.inputs) < 400
    # The layer that ran in the first pass only still has that pass's three inputs: numbers 0, 1, 2.
    assert torch.equal(acts.sample(2)["2"], acts["2"][2])
    assert (
        len(acts.samples()) == 3 + 2
    )  # a slice is no part of the model: its layers are called one by one, in one pass


def test_clear_makes_room():
    model = FiveConvs()
    with capture(model, max_bytes=sum(SIZES)) as acts:
        for _ in range(3):
            model(X)
            acts.clear()
        model(X)
    assert len(acts) == 5


def test_shared_memory_counts_once():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv1d(1, 4, 3, padding=1))))
    with capture(model, types=(nn.Conv1d, nn.Sequential), max_bytes=SIZES[0]) as acts:
        model(X)
    assert len(acts) == 4  # each container returns what its last layer returned
    assert acts.nbytes == SIZES[0]


def test_parts_of_one_storage_count_once():
    class Halves(nn.Conv1d):
        def forward(self, x):
            return super().forward(x).chunk(2, 1)

    model = nn.ModuleDict({"halves": Halves(1, 4, 3, padding=1)})
    with capture(model, max_bytes=SIZES[0]) as acts:
        model["halves"](X)
    assert acts.nbytes == SIZES[0]


def test_a_view_counts_what_it_keeps_alive():
    class Trims(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)[..., :1]

    model = nn.Sequential(Trims(1, 4, 3, padding=1))
    with capture(model) as acts:
        model(X)
    assert acts["0"].shape == (2, 4, 1)
    assert acts.nbytes == SIZES[0]
    with pytest.raises(MemoryLimitExceeded), capture(model, max_bytes=SIZES[0] - 1):
        model(X)


def test_the_message_says_what_each_layer_keeps_alive_and_not_only_what_it_shows():
    class Trims(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)[..., :1]

    model = nn.Sequential(Trims(1, 4, 3, padding=1), nn.Conv1d(4, 4, 1))
    with pytest.raises(MemoryLimitExceeded, match="needs 32 B more.*The capture holds: 0 960 B"):
        with capture(model, max_bytes=970):
            model(X)


def test_writing_into_an_output_does_not_make_the_account_wrong():
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Identity())
    with torch.no_grad(), capture(model, types=(nn.Conv1d, nn.Identity), keep="last", max_bytes=2 * SIZES[0]) as acts:
        for _ in range(20):
            y = model(X)
            acts["1"].add_(1)  # ends the sharing: from here on both have memory of their own
            assert acts.nbytes == 2 * SIZES[0]
        del y


def test_memory_that_an_output_left_counts_for_what_comes_there_next():
    memory = torch.zeros(64)  # 256 bytes, at one address all the time

    class Returns(nn.Module):
        def forward(self, x):
            return memory

    model = nn.Sequential(Returns())
    with torch.no_grad(), pytest.raises(MemoryLimitExceeded, match=r"'0' needs 256 B more, but only 88 B of max_bytes"):
        with capture(model, "0", max_bytes=600) as acts:
            for i in range(3):
                model(X)
                acts.calls()[i].output.add_(1)  # leaves the memory that it shared
    assert acts.nbytes == 2 * 256


def test_memory_that_was_freed_since_is_not_counted_when_the_limit_is_met():
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1))
    with torch.no_grad(), capture(model, max_bytes=2 * SIZES[0]) as acts:
        model(X)
        model(X)
        acts.calls()[0].output.set_(torch.zeros(0))
        model(X)
    assert acts.nbytes == 2 * SIZES[0]


def test_what_replaces_a_smaller_output_is_named_so_and_the_smaller_one_stays():
    model = FiveConvs()
    message = r"needs 3\.8 KiB in place of its last output, but only 1\.9 KiB of max_bytes=1920 \(1\.9 KiB\) is left"
    with torch.no_grad(), pytest.raises(MemoryLimitExceeded, match=message):
        with capture(model, "convs.4", keep="last", max_bytes=SIZES[4]) as acts:
            model(X)
            kept = acts["convs.4"].clone()
            model(torch.randn(4, 1, 30))
    assert torch.equal(acts["convs.4"], kept)
    assert acts.nbytes == SIZES[4]


@pytest.mark.filterwarnings("ignore:Sparse C.. tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_output_counts_its_indices_and_values(layout):
    class Sparse(nn.Module):
        def forward(self, x):
            return torch.eye(5).to_sparse(layout=layout)

    indices = {torch.sparse_coo: 2 * 5, torch.sparse_csr: 6 + 5, torch.sparse_csc: 6 + 5}[layout]
    model = nn.Sequential(Sparse())
    with capture(model, "0") as acts:
        model(X)
    assert acts.nbytes == acts.calls()[0].nbytes == indices * 8 + 5 * 4


def test_channel_and_time_slices_keep_only_their_own_bytes():
    model = FiveConvs()
    for reduce, kept in ((lambda t: t[:, :2], 2 * 30), (lambda t: t[..., 5:12], 4 * 7), (lambda t: t[:, 1, ::3], 10)):
        with torch.no_grad(), capture(model, "convs.0", reduce=reduce) as acts:
            model(X)
        assert acts["convs.0"].untyped_storage().nbytes() == acts.nbytes == 2 * kept * 4


# -- the forecast


def captured_bytes(model, x, **options):
    with torch.no_grad(), capture(model, **options) as acts:
        model(x)
    return acts.nbytes


class Shares(nn.Module):
    """A convolution, a view of it, a ReLU in place, and a view of that.

    In a capture the first view shares the convolution's copy-on-write memory. The ReLU's write ends that: what it and its
    view return lies in the memory of their inputs, which is not the capture's to share, so each of them is cloned.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.identity = nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.flatten = nn.Flatten()

    def forward(self, x):
        return self.flatten(self.relu(self.identity(self.conv(x))))


def test_the_forecast_counts_shared_memory_once_as_the_capture_does():
    types = (nn.Conv1d, nn.Identity, nn.ReLU, nn.Flatten)
    rows = list_layers(Shares(), types=types, example=X)
    assert [row.nbytes for row in rows] == [960, 0, 960, 960]
    assert [row.nbytes_per_sample for row in rows] == [480, 0, 480, 480]
    assert captured_bytes(Shares(), X, types=types) == 3 * 960


def test_the_forecast_does_not_take_memory_that_was_given_out_again_for_shared():
    model = nn.Sequential(*(nn.Conv1d(4, 4, 3, padding=1) for _ in range(20)))
    x = torch.randn(2, 4, 300)
    rows = list_layers(model, example=x)
    assert [row.nbytes for row in rows] == [2 * 4 * 300 * 4] * 20


def test_the_forecast_counts_what_a_view_keeps_alive():
    class Trims(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)[..., :1]

    (row,) = list_layers(nn.Sequential(Trims(1, 4, 3, padding=1)), example=X)
    assert (tuple(row.shape), row.nbytes) == ((2, 4, 1), 960)
    (row,) = list_layers(nn.Sequential(Trims(1, 4, 3, padding=1)), example=X, dtype=torch.float16)
    assert row.nbytes == 2 * 4 * 2


@pytest.mark.parametrize("options", [{}, {"reduce": lambda t: t.amax(-1)}, {"dtype": torch.bfloat16}])
def test_the_forecast_is_what_a_capture_keeps(options):
    model = FiveConvs(inplace=True)
    table = list_layers(model, example=X, **options)
    assert sum(row.nbytes for row in table) == captured_bytes(model, X, **options)
    each = 8 if "reduce" in options else 8 * 30
    assert table[4].nbytes_per_sample == each * (2 if "dtype" in options else 4)
    assert table.columns[-2:] == ("bytes", "per sample")


def test_the_forecast_of_one_signal_without_a_batch_axis_is_for_one_sample():
    (row,) = list_layers(nn.Sequential(nn.Conv1d(6, 4, 3, padding=1)), example=torch.randn(6, 30))
    assert row.nbytes == row.nbytes_per_sample == 4 * 30 * 4


def test_the_forecast_counts_every_call_and_keeps_none_of_the_values():
    model = nn.Sequential(*[nn.Conv1d(1, 1, 3, padding=1)] * 3)
    (row,) = list_layers(model, example=X)
    assert row.nbytes == 3 * 2 * 30 * 4


def test_a_model_that_swallows_the_error_does_not_make_it_silent():
    model = AfterConv(lambda y: y)

    def forward(x):
        try:
            return model.conv(x)
        except Exception:
            return x

    model.forward = forward
    with pytest.raises(MemoryLimitExceeded), capture(model, max_bytes=10):
        model(torch.randn(1, 2, 9))
    with pytest.warns(UserWarning, match="max_bytes=10"), capture(model, max_bytes=10, strict=False):
        model(torch.randn(1, 2, 9))


def test_a_reduce_that_raises_names_the_layer():
    model = FiveConvs()
    with (
        pytest.raises(
            ConvtapError, match=r"layer 'convs.0': reduce failed on the output of shape \(2, 4, 30\): IndexError"
        ),
        capture(model, reduce=lambda t: t.mean(7)),
    ):
        model(X)


def test_a_reduce_that_returns_no_tensor_names_the_layer():
    model = FiveConvs()
    with (
        pytest.raises(
            TypeError, match=r"layer 'convs.0': reduce returned a float, which is not a tensor. .*reduce=lambda"
        ),
        capture(model, reduce=lambda t: t.mean().item()),
    ):
        model(X)
