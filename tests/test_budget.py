"""max_bytes, and errors in what is done with an output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convtap import ConvtapError, MemoryLimitExceeded, capture
from convtap._memory import parse_bytes
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
            match=r"the output of 'convs.3' needs 1.9 KiB more, and max_bytes=\d+ .*Held now: convs.2 1.9 KiB, convs.0 960 B, "
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
            TypeError, match=r"layer 'convs.0': reduce returned a float, and it must return a tensor. .*reduce=lambda"
        ),
        capture(model, reduce=lambda t: t.mean().item()),
    ):
        model(X)
