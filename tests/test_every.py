"""``every=n`` keeps forward passes 0, n, 2n, … only, and the others leave nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from convtap import InvalidType, InvalidValue, NotCaptured, capture, statistics
from tests.reference import same


class Both(nn.Module):
    """A plain layer, one with weight normalization, and a convolution called as a function."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv1d(1, 2, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3, padding=1))
        self.loose = nn.Parameter(torch.randn(2, 2, 3))

    def forward(self, x):
        return F.conv1d(self.normed(self.plain(x)), self.loose)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Both()


BATCHES = [torch.full((2, 1, 8), float(i)) for i in range(7)]
KEYS = ["plain", "normed", "loose"]


def one_pass(model, x, **options):
    with capture(model, **options) as acts:
        model(x)
    return dict(acts)


@pytest.mark.parametrize("at", ["output", "input", "activation"])
@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_the_passes_kept_are_those_of_captures_of_their_own(model, every, at):
    model = nn.Sequential(model, nn.ReLU()) if at == "activation" else model
    options = {"at": at, "strict": False}
    with torch.no_grad(), capture(model, every=every, **options) as acts:
        for x in BATCHES:
            model(x)
    with torch.no_grad():
        for number in range(0, len(BATCHES), every):
            expected = list(one_pass(model, BATCHES[number], **options).values())
            assert same([call.output for call in acts.calls(forward=number)], expected)
    assert sorted({call.forward for call in acts.calls()}) == list(range(0, len(BATCHES), every))


def test_samples_and_keys_are_those_of_the_passes_kept(model):
    with torch.no_grad(), capture(model, every=3) as acts:
        for x in BATCHES:
            model(x)
    assert len(acts.samples()) == 2 * 3
    assert list(acts) == [f"{key}#{i}" for i in range(3) for key in KEYS]
    assert "captured" in acts.coverage["plain"].state


def test_passes_that_are_not_kept_hold_no_memory_and_run_no_reduction(model):
    reduced = []

    def reduce(t):
        reduced.append(t.shape)
        return t.mean()

    with torch.no_grad(), capture(model, reduce=reduce, every=5) as acts:
        for x in BATCHES:
            model(x)
    assert len(reduced) == len(acts) == 2 * len(KEYS)


@pytest.mark.parametrize("options", [{"detach": False}, {"grads": True}, {"keep": "last"}, {"functional": False}])
def test_other_options_hold_for_the_passes_kept(model, options):
    with capture(model, every=2, strict=False, **options) as acts:
        for x in BATCHES[:4]:
            model(x).sum().backward()
    kept = {"keep": [2]}.get(next(iter(options)), [0, 2])
    assert sorted({call.forward for call in acts.calls()}) == kept
    if options.get("grads"):
        assert all(call.grad is not None for call in acts.calls())


def test_a_checkpointed_layer_counts_once_in_the_passes_kept():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return checkpoint(self.conv, x, use_reentrant=False)

    model = Checkpointed()
    with capture(model, every=2) as acts:
        for x in BATCHES[:4]:
            model(x).sum().backward()
    assert [call.forward for call in acts.calls()] == [0, 2]


def test_compiled_models_skip_passes_too(model):
    compiled = torch.compile(nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU()), backend="eager")
    with torch.no_grad(), capture(compiled, every=2) as acts:
        for x in BATCHES[:5]:
            compiled(x)
    assert [call.forward for call in acts.calls()] == [0, 2, 4]


def test_a_bypassed_layer_is_still_an_error(model):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return x @ self.conv.weight.reshape(3, 1).repeat(4, 1)[:8]

    with pytest.raises(NotCaptured, match="conv"):
        one_pass(Fused(), torch.zeros(2, 1, 8), every=2)


def test_parts_that_code_calls_one_by_one_are_passes_too():
    layers = nn.ModuleList([nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1)])
    with torch.no_grad(), capture(layers, every=2) as acts:
        for x in BATCHES[:4]:
            layers[1](layers[0](x))
    assert {call.forward for call in acts.calls()} == {0, 2}
    assert len(acts) == 4


def test_statistics_and_capture_look_at_the_same_passes(model):
    with torch.no_grad(), statistics(model, every=3) as stats, capture(model, every=3) as acts:
        for x in BATCHES:
            model(x)
    assert int(stats["plain"].count.sum()) == sum(call.output.numel() for call in acts.calls("plain"))


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (0, InvalidValue, "every=0 selects no forward pass. Pass 1 for all"),
        (-1, InvalidValue, "every=-1 selects no forward pass"),
        (2.0, InvalidType, "every is a float. Pass an int"),
        (True, InvalidType, "every is a bool"),
    ],
)
def test_bad_values_say_what_to_pass(model, every, error, message):
    with pytest.raises(error, match=message):
        capture(model, every=every)
