"""Running statistics: what they count is what NumPy computes over all data at once, however a convolution is called."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convtap
from convtap import (
    ConvtapError,
    CoverageWarning,
    InvalidType,
    InvalidValue,
    LayerNotFound,
    NotCaptured,
    Statistics,
    StoreError,
    Unsupported,
    capture,
    compare,
    statistics,
    timeline,
)
from convtap._tensors.channel_statistics import ChannelStatistics
from convtap._tensors.quantile_sketch import digits_for, relative_error


def network():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv1d(4, 6, 5)).eval()


def batches(count=5):
    return torch.randn(count, 3, 2, 40)


def by_hand(model, data):
    """Everything that each convolution returned, by channel: {name: (C, values)} in float64."""
    found = {}
    with capture(model, detach=True) as acts:
        for x in data:
            model(x)
    for call in acts.calls():
        rows = np.moveaxis(call.output.double().numpy(), 1, 0).reshape(call.output.shape[1], -1)
        found.setdefault(call.name, []).append(rows)
    return {name: np.concatenate(rows, 1) for name, rows in found.items()}


def assert_same(layer, rows, rtol=1e-12, var_rtol=1e-9):
    """The numbers of a layer against NumPy's over its values, (C, values)."""
    finite = np.isfinite(rows)
    masked = np.ma.masked_array(rows, ~finite)
    assert layer.count.tolist() == [rows.shape[1]] * len(rows)
    assert layer.zeros.tolist() == (rows == 0).sum(1).tolist()
    assert layer.nan.tolist() == np.isnan(rows).sum(1).tolist()
    assert layer.inf.tolist() == np.isinf(rows).sum(1).tolist()
    for name, expected in (("min", masked.min(1)), ("max", masked.max(1))):
        assert getattr(layer, name).numpy().tolist() == pytest.approx(
            expected.filled(np.nan), nan_ok=True, rel=0, abs=0
        )
    scale = np.abs(masked).max(1).filled(0)
    np.testing.assert_allclose(layer.mean.numpy(), masked.mean(1).filled(np.nan), rtol=rtol, atol=1e-14 * scale.max())
    np.testing.assert_allclose(layer.var.numpy(), masked.var(1).filled(np.nan), rtol=var_rtol, atol=1e-28 * scale.max())
    np.testing.assert_allclose(layer.std.numpy(), np.sqrt(layer.var.numpy()), rtol=1e-15)


def added(tensors, axis=1, quantiles=None, name="x"):
    """The statistics of tensors, without a model."""
    source = ChannelStatistics(tensors[0].shape[axis], None if quantiles is None else digits_for(quantiles))
    for tensor in tensors:
        source.add(tensor, axis)
    return convtap.LayerStatistics(name, source, by_channel=True, calls=len(tensors))


def as_rows(tensors, axis=1):
    return np.concatenate([np.moveaxis(t.double().numpy(), axis, 0).reshape(t.shape[axis], -1) for t in tensors], 1)


# -- exactness


def test_statistics_are_those_of_all_outputs_at_once():
    model, data = network(), batches()
    with statistics(model) as stats:
        for x in data:
            model(x)
    expected = by_hand(model, data)
    assert list(stats) == list(expected) == ["0", "2"]
    for name, rows in expected.items():
        assert_same(stats[name], rows)
    assert stats["0"].calls == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [False, True])
def test_each_type_counts_as_numpy_does_in_float64(dtype, bad):
    tensors = [(torch.randn(3, 5, size) * 3 + 1).to(dtype) for size in (7, 1, 300, 0, 20)]
    for tensor in tensors:
        tensor[tensor.abs() < 0.5] = 0
    if bad:
        tensors[0][0, 0, 0] = math.nan
        tensors[2][1, 0, 5:9] = math.inf
        tensors[2][1, 1, 3] = -math.inf
        tensors[3 + 1][:, 4] = math.nan
    assert_same(added(tensors), as_rows(tensors))


def test_a_channel_without_finite_values_has_nan_and_counts():
    tensors = [torch.full((2, 2, 3), math.nan), torch.full((1, 2, 2), math.inf)]
    tensors[0][:, 1] = 5.0
    layer = added(tensors, quantiles=0.01)
    assert_same(layer, as_rows(tensors))
    for value in (layer.mean, layer.var, layer.min, layer.max, layer.quantile(0.5)):
        assert value.isnan().tolist() == [True, False]
    assert layer.dead == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spread_that_is_small_beside_the_mean_is_exact(dtype):
    spread = 1e-3 if dtype is torch.float64 else 1.0  # float32 has steps of 1/16 there
    tensors = [(1e6 + spread * torch.randn(4, 3, 100, dtype=torch.float64)).to(dtype) for _ in range(50)]
    rows = as_rows(tensors)
    layer = added(tensors)
    shifted = rows - 1e6  # exact, and so NumPy's own rounding is not part of what is compared
    np.testing.assert_allclose(layer.mean.numpy() - 1e6, shifted.mean(1), rtol=0, atol=2e-10)
    np.testing.assert_allclose(layer.var.numpy(), shifted.var(1), rtol=1e-10)


def test_many_updates_and_merges_lose_nothing():
    block = 1e6 + 1e-3 * torch.randn(10_000, 1, 1, 2, dtype=torch.float64)
    source = ChannelStatistics(1, None)
    for tensor in block:
        source.add(tensor, 1)
    one = source.to("cpu")
    for _ in range(99):
        source.merge(one)
    layer = convtap.LayerStatistics("x", source, by_channel=True)
    shifted = block.numpy().reshape(-1) - 1e6
    assert layer.count.tolist() == [2_000_000]
    np.testing.assert_allclose(layer.mean.numpy() - 1e6, shifted.mean(), rtol=0, atol=2e-10)
    np.testing.assert_allclose(layer.var.numpy(), shifted.var(), rtol=1e-10)


def test_large_tensors_are_worked_on_in_pieces_that_make_no_difference(monkeypatch):
    tensors = [torch.randn(3, 4, 50), torch.randn(2, 4, 9)]
    tensors[0][1, 2, 30] = math.nan
    expected = added(tensors, quantiles=0.01)
    monkeypatch.setattr("convtap._tensors.channel_statistics._PIECE", 16)
    layer = added(tensors, quantiles=0.01)
    assert_same(layer, as_rows(tensors))
    assert torch.equal(layer.quantile(0.3), expected.quantile(0.3))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
def test_the_channels_may_be_any_axis(axis):
    tensors = [torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6).transpose(0, 1).contiguous().transpose(0, 1)]
    assert_same(added(tensors, axis), as_rows(tensors, axis))


# -- quantiles

DISTRIBUTIONS = {
    "normal": lambda g, n: g.normal(size=n),
    "far from zero": lambda g, n: g.normal(1000, 1, size=n),
    "uniform": lambda g, n: g.uniform(-1, 1, size=n),
    "exponential": lambda g, n: g.exponential(size=n),
    "log-normal": lambda g, n: g.lognormal(0, 2, size=n),
    "Pareto": lambda g, n: g.pareto(1.0, size=n) + 1,
    "Cauchy": lambda g, n: g.standard_cauchy(size=n),
    "Laplace": lambda g, n: g.laplace(-3, 5, size=n),
    "after a ReLU": lambda g, n: np.maximum(g.normal(size=n), 0),
    "two peaks": lambda g, n: np.where(g.random(n) < 0.5, g.normal(-50, 1, n), g.normal(1e-3, 1e-4, n)),
    "tiny": lambda g, n: 1e-30 * g.normal(size=n),
    "integers": lambda g, n: g.integers(-100, 100, size=n).astype(float),
}
QS = (0, 0.001, 0.01, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99, 0.999, 1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("error", [0.05, 0.01])
def test_quantiles_are_within_the_relative_error(name, error):
    values = DISTRIBUTIONS[name](np.random.default_rng(0), 200_000).astype(np.float32)
    layer = added([torch.from_numpy(part)[None, None] for part in np.split(values, 4)], quantiles=error)
    assert layer.relative_error <= error
    found = layer.quantile(QS)[:, 0].numpy()
    expected = np.quantile(values.astype(np.float64), QS, method="lower")
    tiny = 2.0**-31 * np.abs(values).max()
    assert (np.abs(found - expected) <= layer.relative_error * np.abs(expected) * (1 + 1e-9) + tiny).all()


def test_the_relative_error_is_the_coarsest_that_was_asked_for():
    for error in (0.5, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001):
        digits = digits_for(error)
        assert relative_error(digits) <= error
        assert digits == 1 or relative_error(digits - 1) > error


def test_bins_are_joined_at_the_low_end_when_the_values_grow():
    tensors = [torch.randn(1, 2, 1000) * 10.0**power for power in (-20, -3, 0, 8, 4)]
    layer, rows = added(tensors, quantiles=0.01), as_rows(tensors)
    for q in (0.05, 0.2, 0.35, 0.65, 0.8, 0.95):
        expected = np.quantile(rows, q, axis=1, method="lower")
        np.testing.assert_allclose(layer.quantile(q).numpy(), expected, rtol=0.01, atol=np.abs(rows).max() * 2.0**-31)


def test_float64_beyond_float32_is_bounded_by_the_exact_minimum_and_maximum():
    layer = added([torch.tensor([1e300, -1e300, 1e-300, 0.0], dtype=torch.float64)[None, None]], quantiles=0.01)
    assert (layer.min.item(), layer.max.item()) == (-1e300, 1e300)
    assert layer.quantile((0.0, 1.0))[:, 0].tolist() == [-1e300, 1e300]
    assert abs(layer.quantile(0.5).item()) < 1e-20


def test_a_bin_that_would_overflow_gets_64_bits():
    source = ChannelStatistics(1, 6)
    source.add(torch.ones(1, 1, 1000), 1)
    for _ in range(22):
        source.merge(source.to("cpu"))
    layer = convtap.LayerStatistics("x", source, by_channel=True)
    assert layer.count.item() == 1000 * 2**22 > 2**31
    source.add(torch.full((1, 1, 1000), 3.0), 1)
    assert layer.quantile(0.5).item() == pytest.approx(1, rel=0.01)
    assert source.sketch.counts.sum().item() == 1000 * 2**22 + 1000


def test_without_quantiles_there_are_none_and_the_error_names_the_option():
    model = network()
    with statistics(model, quantiles=None) as stats:
        model(batches()[0])
    assert stats["0"].relative_error is None
    assert stats.nbytes < 2000
    with pytest.raises(Unsupported, match="the quantiles of '0' were not computed. Remove quantiles=None"):
        stats["0"].quantile(0.5)
    assert "99%" in str(stats)


# -- merging


def test_merge_is_associative_up_to_rounding_and_equals_one_pass():
    tensors = [torch.randn(2, 3, size) * scale + 1e4 for size, scale in ((5, 1), (300, 100), (40, 0.01))]
    a, b, c = (Statistics({"x": added([tensor], quantiles=0.01)}) for tensor in tensors)
    left, right, once = a.merge(b).merge(c)["x"], a.merge(b.merge(c))["x"], added(tensors, quantiles=0.01)
    for layer in (left, right):
        assert_same(layer, as_rows(tensors))
        assert layer.calls == 3
        for q in (0.01, 0.5, 0.9):
            assert torch.equal(layer.quantile(q), once.quantile(q))
    assert_same(a["x"], as_rows(tensors[:1]))  # neither side changed


def test_merge_keeps_layers_that_one_side_lacks():
    a, b = Statistics({"x": added([torch.randn(1, 2, 5)])}), Statistics({"y": added([torch.randn(1, 3, 5)])})
    assert list(a.merge(b)) == ["x", "y"]
    assert torch.equal(a.merge(b)["y"].mean, b["y"].mean)


def test_merge_refuses_other_channels_and_other_quantiles():
    a = Statistics({"x": added([torch.randn(1, 2, 5)], quantiles=0.01)})
    with pytest.raises(
        InvalidValue, match="'x' has two numbers of channels, 2 and 3. Compute both with the same model"
    ):
        a.merge(Statistics({"x": added([torch.randn(1, 3, 5)], quantiles=0.01)}))
    with pytest.raises(InvalidValue, match="two relative errors of quantiles"):
        a.merge(Statistics({"x": added([torch.randn(1, 2, 5)], quantiles=0.1)}))
    with pytest.raises(
        InvalidType, match=r"other is a dict, which is not a Statistics. Write for example a.merge\(b\)"
    ):
        a.merge({})


# -- channels


def test_a_channel_that_never_changes_is_dead_and_one_at_its_bound_is_saturated():
    x = torch.randn(8, 5, 100)
    x[:, 1] = 3.0
    x[:, 2] = 0.0
    x[:, 3] = (10 * x[:, 3]).clamp(-1, 1)
    x[:, 4] = x[:, 4].relu()  # half of it is zero, which is no saturation
    layer = added([x[:4], x[4:]])
    assert layer.dead == [1, 2]
    assert layer.saturated == [3]
    expected = ((x[:, 3] == -1) | (x[:, 3] == 1)).double().mean()
    assert layer.saturation[3].item() == pytest.approx(expected.item())
    assert layer.saturation[2].item() == 0


def test_a_single_value_is_dead_only_if_it_is_zero():
    assert added([torch.tensor([[[3.0], [0.0]]])]).dead == [1]


def test_per_layer_gives_scalars_of_all_channels():
    model, data = network(), batches()
    with statistics(model, per="layer") as stats:
        for x in data:
            model(x)
    rows = by_hand(model, data)["2"].reshape(1, -1)
    layer = stats["2"]
    assert layer.mean.shape == layer.count.shape == layer.quantile(0.5).shape == ()
    assert layer.quantile((0.1, 0.5)).shape == (2,)
    assert layer.channels is None
    assert float(layer.var) == pytest.approx(rows.var(), rel=1e-12)
    assert int(layer.count) == rows.size


def test_whole_is_the_layer_over_all_of_its_channels():
    tensors = [torch.randn(3, 4, 50) + torch.arange(4)[:, None] * 1000.0, torch.randn(3, 4, 50)]
    tensors[0][0, 0, 0] = math.nan
    layer = added(tensors, quantiles=0.01)
    rows = as_rows(tensors).reshape(1, -1)
    whole = layer.whole
    assert int(whole.count) == rows.size
    finite = rows[np.isfinite(rows)]
    assert float(whole.mean) == pytest.approx(finite.mean(), rel=1e-13)
    assert float(whole.var) == pytest.approx(finite.var(), rel=1e-12)
    assert (float(whole.min), float(whole.max), int(whole.nan)) == (finite.min(), finite.max(), 1)
    assert float(whole.quantile(0.7)) == pytest.approx(np.quantile(finite, 0.7, method="lower"), rel=0.01)


def test_channels_are_the_last_axis_where_the_layer_is_known_to_have_them_there():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)).eval()
    x = torch.randn(2, 30, 5)
    with statistics(model, types=(nn.Linear, nn.LayerNorm)) as stats:
        y = model(x)
    assert stats["1"].channels == 7
    np.testing.assert_allclose(stats["1"].mean.numpy(), y.detach().double().mean((0, 1)), rtol=1e-12, atol=1e-15)


def test_a_single_signal_has_its_channels_on_axis_0():
    model = nn.Sequential(nn.Conv1d(2, 4, 3))
    x = torch.randn(2, 30)
    with statistics(model) as stats:
        y = model(x)
    np.testing.assert_allclose(stats["0"].mean.numpy(), y.detach().double().mean(1), rtol=1e-12)


def test_structures_have_a_row_for_each_tensor():
    model = nn.Sequential(nn.LSTM(2, 3, batch_first=True))
    with statistics(model, "0") as stats:
        y, _ = model(torch.randn(4, 9, 2))
    assert list(stats) == ["0[0]", "0[1][0]", "0[1][1]"]
    np.testing.assert_allclose(stats["0[0]"].mean.numpy(), y.detach().double().mean((0, 1)), rtol=1e-12, atol=1e-15)
    with statistics(model, "0[0]") as stats:
        model(torch.randn(4, 9, 2))
    assert list(stats) == ["0[0]"]


# -- however it is called


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x):
        return F.conv1d(x, self.kernel)


def test_a_convolution_called_as_a_function_is_counted_under_its_kernel():
    model, data = Functions(), batches()
    with statistics(model) as stats:
        for x in data:
            model(x)
    rows = as_rows([F.conv1d(x, model.kernel).detach() for x in data])
    assert list(stats) == ["kernel"]
    assert_same(stats["kernel"], rows)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_runs_compiled_and_counts_the_same():
    model, data = network(), batches()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(data[0])
        with statistics(compiled) as stats:
            for x in data:
                compiled(x)
    for name, rows in by_hand(model, data).items():
        assert_same(stats[name], rows)


def test_a_scripted_model_counts_the_same():
    model, data = network(), batches()
    script = torch.jit.script(model)
    with statistics(script) as stats:
        for x in data:
            script(x)
    for name, rows in by_hand(model, data).items():
        assert_same(stats[name], rows)


def test_in_place_layers_spoil_nothing_and_the_model_returns_what_it_did():
    model, x = network(), batches()[0]
    expected = model(x)
    with statistics(model) as stats:
        y = model(x)
    assert torch.equal(y, expected)
    assert float(stats["0"].min.min()) < 0  # before the ReLU that overwrites it
    assert [*model[0]._forward_hooks, *model._forward_pre_hooks] == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_grad_modes_may_change_between_passes(mode):
    model, data = network(), batches()
    with statistics(model) as stats:
        with torch.inference_mode():
            model(data[0])
        with mode():
            for x in data[1:]:
                model(x)
    for name, rows in by_hand(model, data).items():
        assert_same(stats[name], rows)


def test_training_goes_on_as_without():
    model, data = network(), batches()
    with statistics(model):
        model(data[0]).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(data[0]).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_functional_transforms_are_counted_in_whole_batches():
    model, data = network(), batches()
    with statistics(model) as stats:
        torch.func.grad(lambda x: model(x).sum())(data[0])
        torch.func.vmap(model)(data[1:])
    for name, rows in by_hand(model, data).items():
        assert_same(stats[name], rows)


def test_the_inputs_and_the_activations_of_layers_are_counted():
    model, data = network(), batches()
    with statistics(model, at="input") as inputs, torch.no_grad():
        for x in data:
            model(x)
    assert_same(inputs["0"], as_rows(list(data)))
    with statistics(model, "0", at="activation") as active:
        for x in data:
            model(x)
    assert_same(active["0"], np.maximum(by_hand(model, data)["0"], 0))


def test_an_activation_that_is_taken_back_is_counted_once():
    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y * torch.sigmoid(y)

    model, data = Swish(), batches()
    with statistics(model, at="activation") as stats:
        outputs = [model(x).detach() for x in data]
    assert_same(stats["conv"], as_rows(outputs))


# -- passes and runs


def test_every_looks_at_each_nth_pass():
    model, data = network(), batches(7)
    with statistics(model, every=3) as stats:
        for x in data:
            model(x)
    for name, rows in by_hand(model, data[::3]).items():
        assert_same(stats[name], rows)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x))


def test_runs_in_one_pass_are_one_row_or_a_row_each():
    model, data = Twice(), batches()
    with statistics(model) as one, statistics(model, calls="keys") as each:
        for x in data:
            model(x)
    first = [model.conv(x).detach() for x in data]
    second = [model.conv(x).detach() for x in first]
    assert list(one) == ["conv"]
    assert_same(one["conv"], as_rows([*first, *second]))
    assert list(each) == ["conv#0", "conv#1"]
    assert_same(each["conv#0"], as_rows(first))
    assert_same(each["conv#1"], as_rows(second))


def test_memory_does_not_grow_with_the_passes():
    model, x = network(), batches()[0]
    capturing = statistics(model)
    with torch.no_grad(), capturing as stats:
        for _ in range(200):
            model(x)
        size, kept = stats.nbytes, len(capturing._session.log.inputs)
        for _ in range(200):
            model(x)
        assert stats.nbytes == size
        assert len(capturing._session.log.inputs) <= kept <= 65
        assert len(capturing._session.log.calls) == 0
    assert stats["0"].calls == 400


def test_clear_begins_anew_inside_the_capture():
    model, data = network(), batches()
    with statistics(model) as stats:
        model(data[0])
        assert stats["0"].calls == 1  # readable at any time
        stats.clear()
        for x in data[1:]:
            model(x)
    for name, rows in by_hand(model, data[1:]).items():
        assert_same(stats[name], rows)


class Forbidding(TorchDispatchMode):
    """Refuses what makes the host wait for an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item", "index.")
        assert not name.startswith(waits) or "index_add" in name or _is_plain_index(func, args), name
        return func(*args, **(kwargs or {}))


def _is_plain_index(func, args):
    """An index with whole numbers has a known size; one with booleans has to be counted first."""
    return "index" in func.__name__ and all(i is None or i.dtype is not torch.bool for i in args[1])


@pytest.mark.parametrize("bad", [False, True])
def test_on_an_accelerator_nothing_waits_for_a_layer(monkeypatch, bad):
    """The path of an accelerator, run on the CPU."""
    tensors = [torch.randn(2, 3, 50).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    if bad:
        tensors[1][0, 1, 3:9] = math.inf
        tensors[2][1, 2, 5] = math.nan
    source = ChannelStatistics(3, 6)
    monkeypatch.setattr("convtap._tensors.channel_statistics._waits", lambda device: False)
    with Forbidding():
        for tensor in tensors:
            source.add(tensor, 1)
    layer = convtap.LayerStatistics("x", source, by_channel=True)
    rows = as_rows(tensors)
    assert_same(layer, rows)
    for channel in range(3):
        finite = rows[channel][np.isfinite(rows[channel])]
        expected = np.quantile(finite, 0.9, method="lower")
        assert layer.quantile(0.9)[channel].item() == pytest.approx(expected, rel=0.01)


def test_the_check_for_waiting_can_fail():
    with pytest.raises(AssertionError), Forbidding():
        bool(torch.ones(1).any())


# -- what a capture holds


def test_a_capture_has_the_statistics_of_what_it_holds():
    model, data = network(), batches()
    with capture(model) as acts, statistics(model) as stats:
        for x in data:
            model(x)
    found = acts.statistics()
    assert list(found) == list(stats)
    for name, layer in found.items():
        assert torch.equal(layer.mean, stats[name].mean)
        assert torch.equal(layer.quantile(0.3), stats[name].quantile(0.3))
    assert acts.statistics(per="layer", quantiles=None)["0"].mean.shape == ()


# -- padding


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(1, 4, 5, stride=2), nn.Conv1d(4, 6, 3)

    def forward(self, x, lengths):
        return self.conv2(self.conv1(x))


def test_padding_is_left_out():
    model = Masked()
    lengths = [[60, 41, 23], [17, 60, 30]]
    data = torch.randn(2, 3, 1, 60)
    with statistics(model, lengths=lambda x, n: n, timeline=timeline(model, (data[0], lengths[0]))) as stats:
        for x, n in zip(data, lengths, strict=True):
            model(x, n)
    rows = {"conv1": [], "conv2": []}
    for x, n in zip(data, lengths, strict=True):
        for row, length in zip(x, n, strict=True):  # each input by itself
            first = model.conv1(row[None, :, :length]).detach()
            rows["conv1"].append(first)
            rows["conv2"].append(model.conv2(first).detach())
    for name, outputs in rows.items():
        assert stats[name].count[0].item() == sum(output.shape[2] for output in outputs)
        np.testing.assert_allclose(stats[name].mean.numpy(), as_rows(outputs).mean(1), rtol=1e-5, atol=1e-6)


def test_frames_that_see_padding_are_named():
    model = nn.Sequential(nn.Conv1d(1, 4, 5, padding=2), nn.Conv1d(4, 4, 5, padding=2))
    x = torch.randn(2, 1, 30)
    with (
        pytest.warns(CoverageWarning, match="frames of 2 layers in padded batches") as found,
        statistics(model, lengths=lambda x: [30, 20], timeline=timeline(model, x)),
    ):
        model(x)
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lengths": lambda x: [3]}, InvalidValue, "timeline= is missing. Pass lengths= and timeline="),
        ({"lengths": [3], "timeline": "t"}, InvalidType, "lengths is a list. Pass a function"),
        ({"lengths": lambda x: [3], "timeline": 3}, InvalidType, "timeline is a int. Pass the result of timeline"),
        ({"per": "row"}, InvalidValue, "per='row' is invalid. Pass one of 'channel', 'layer'"),
        ({"calls": "error"}, InvalidValue, "calls='error' is invalid. Pass one of"),
        ({"every": 0}, InvalidValue, "every=0 selects no forward pass. Pass 1 for all"),
        ({"every": 1.5}, InvalidType, "every is a float. Pass an int"),
        ({"quantiles": 2}, InvalidValue, "quantiles=2 is not a relative error. Pass a number"),
        ({"quantiles": True}, InvalidValue, "quantiles=True is not a relative error"),
        ({"at": "weights"}, InvalidValue, "at='weights' is invalid. Pass one of"),
        ({"layers": "conv9"}, LayerNotFound, "no layer is named 'conv9'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_an_error_before_the_model_runs(options, error, says):
    with pytest.raises(error, match=says):
        statistics(network(), **options)


def test_wrong_lengths_are_an_error():
    model = Masked()
    x = torch.randn(3, 1, 60)
    axis = timeline(model, (x, None))
    with (
        pytest.raises(InvalidValue, match="lengths returned 1 number for 3 inputs. Return the number of samples"),
        statistics(model, lengths=lambda x, n: n, timeline=axis),
    ):
        model(x, [60])
    with (
        pytest.raises(ConvtapError, match="lengths failed on the model's arguments: TypeError"),
        statistics(model, lengths=lambda x: x, timeline=axis),
    ):
        model(x, [60])
    with (
        pytest.raises(Unsupported, match="'conv1' ran outside of a call of the model"),
        statistics(model, lengths=lambda x, n: n, timeline=axis),
    ):
        model.conv1(x)


# -- errors


def test_a_layer_whose_channels_change_is_named_and_nothing_before_it_is_lost():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 6, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    model, x = Shared(), batches()[0]
    message = "'act' returned 4 channels before and 6 now. Pass per='layer', or calls='keys'"
    with pytest.raises(Unsupported, match=message), statistics(model, types=nn.ReLU) as stats:
        model(x)
    assert stats["act"].calls == 1
    with statistics(model, types=nn.ReLU, calls="keys") as stats:
        model(x)
    assert [stats[name].channels for name in ("act#0", "act#1")] == [4, 6]


def test_an_error_that_the_model_swallows_is_raised_on_exit():
    class Swallowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            self.act(x)
            with contextlib.suppress(Exception):
                self.act(x[:, :1])

    model = Swallowing()
    with pytest.raises(Unsupported, match="2 channels before and 1 now"), statistics(model, types=nn.ReLU):
        model(batches()[0])


def test_an_exception_of_the_body_is_the_one_that_is_raised_and_the_rest_is_there():
    model, data = network(), batches()
    with pytest.raises(KeyError, match="mine"), statistics(model) as stats:
        model(data[0])
        raise KeyError("mine")
    for name, rows in by_hand(model, data[:1]).items():
        assert_same(stats[name], rows)


def test_a_body_that_never_ran_the_model_is_not_captured():
    with pytest.raises(NotCaptured, match="nothing was captured"), statistics(network()):
        pass


def test_mistakes_name_what_to_write():
    model = network()
    collecting = statistics(model)
    with pytest.raises(InvalidType, match=r"Run the model inside: with statistics\(model\) as stats"):
        collecting["0"]
    with pytest.raises(InvalidType, match="is not callable. Call the model"):
        collecting(batches()[0])
    with collecting as stats:
        model(batches()[0])
        with pytest.raises(ConvtapError, match="already open.* Open a second one"):
            collecting.__enter__()
    with pytest.raises(LayerNotFound, match="'1' has no statistics. Layers with statistics: 0, 2."):
        stats["1"]
    for wrong, error in (
        (2, InvalidValue),
        ("a", InvalidType),
        (None, InvalidType),
        ([], InvalidValue),
        ([2], InvalidValue),
    ):
        with pytest.raises(error, match="from 0 to 1"):
            stats["0"].quantile(wrong)


# -- shown, saved


def test_the_table_has_a_line_a_layer():
    model, data = network(), batches()
    with statistics(model) as stats:
        for x in data:
            model(x)
    lines = str(stats).splitlines()
    assert lines[0].split() == [
        *("layer", "values", "mean", "std", "min", "1%", "50%", "99%", "max", "zeros", "nan", "inf"),
        *("channels", "dead", "saturated"),
    ]
    assert lines[2].split()[:2] == ["0", str(5 * 3 * 4 * 38)]
    assert lines[2].split()[-3:] == ["4", "0", "0"]
    assert "2 layers" in lines[-1]
    assert "within 0.78 %" in lines[-1]
    assert "<table" in stats._repr_html_()
    assert str(Statistics()) == "no statistics collected"
    assert repr(stats["0"]) == "<LayerStatistics 0: 4 channels, 2,280 values in 5 calls>"


@pytest.mark.parametrize("quantiles", [0.01, None])
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_save_and_load_keep_everything(tmp_path, quantiles, per):
    model, data = network(), batches()
    with statistics(model, quantiles=quantiles, per=per) as stats:
        for x in data:
            model(x)
    stats.save(tmp_path / "stats.safetensors")
    found = Statistics.load(tmp_path / "stats.safetensors")
    assert str(found) == str(stats)
    for name, layer in stats.items():
        assert torch.equal(found[name].var, layer.var)
        assert found[name].calls == layer.calls
    merged = found.merge(stats)
    assert torch.equal(merged["2"].count, 2 * stats["2"].count)


def test_files_that_hold_no_statistics_are_named(tmp_path):
    model = network()
    with capture(model) as acts:
        model(batches()[0])
    acts.save(tmp_path / "acts.safetensors")
    with pytest.raises(StoreError, match="does not hold statistics. Write them with stats.save"):
        Statistics.load(tmp_path / "acts.safetensors")
    with pytest.raises(StoreError, match="does not exist. Write it with stats.save"):
        Statistics.load(tmp_path / "none.safetensors")
    (tmp_path / "half").write_bytes(b"123")
    with pytest.raises(StoreError, match="cannot be read as a safetensors file"):
        Statistics.load(tmp_path / "half")
    with pytest.raises(StoreError, match="cannot be written"):
        acts.statistics().save(tmp_path / "no" / "folder")


# -- drift


def kolmogorov_smirnov(a, b):
    """The distance of two samples, from all of their values."""
    every = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(side), every, side="right") / len(side) for side in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


def test_drift_between_two_data_sets_names_the_channel_that_moved_furthest():
    a, b = torch.randn(4, 5, 500), torch.randn(3, 5, 500)
    b[:, 1] += 2
    b[:, 2] *= 5
    b[:, 3] = 0.25
    a[:, 4] = 0
    drift = compare(*(Statistics({"x": added([side], quantiles=0.01)}) for side in (a, b)))
    row, rows = drift[0], (as_rows([a]), as_rows([b]))
    assert (row.died, row.revived) == ([3], [4])
    assert (row.shift, row.shift_channel) == (math.inf, 4)
    assert row.distance_channel in (1, 3)
    expected = max(kolmogorov_smirnov(rows[0][c], rows[1][c]) for c in range(5))
    assert row.distance == pytest.approx(expected, abs=0.01)
    assert drift.worst is row
    assert "revived" in str(drift)
    assert row.to_dict()["died"] == [3]
    live = [[0, 1, 2]] * 2
    drift = compare(
        *(Statistics({"x": added([side[:, c]], quantiles=None)}) for side, c in zip((a, b), live, strict=True))
    )
    assert drift[0].distance is None
    shifts = np.abs(rows[1].mean(1) - rows[0].mean(1))[:3] / rows[0].std(1)[:3]
    assert (drift[0].shift, drift[0].shift_channel) == (pytest.approx(shifts[1], rel=1e-9), 1)
    assert (drift[0].scale, drift[0].scale_channel) == (pytest.approx(rows[1][2].std() / rows[0][2].std(), rel=1e-9), 2)


def test_no_drift_is_zero_and_other_layers_are_named():
    one = added([torch.randn(2, 3, 50)], quantiles=0.01)
    drift = compare(Statistics({"x": one, "a": one}), Statistics({"x": one, "b": one}))
    assert [(row.name, row.shift, row.scale, row.distance) for row in drift] == [("x", 0.0, 1.0, 0.0)]
    assert (drift.only_a, drift.only_b) == (["a"], ["b"])
    assert "only in a: a" in str(drift)


def test_statistics_that_cannot_be_compared_are_refused():
    one, other = (Statistics({name: added([torch.randn(1, c, 5)])}) for name, c in (("x", 2), ("y", 3)))
    with pytest.raises(InvalidValue, match="no layer in common: x and y. Collect both from the same model"):
        compare(one, other)
    with pytest.raises(InvalidValue, match="'x' has 2 channels in a and 3 in b"):
        compare(one, Statistics({"x": other["y"]}))
    with pytest.raises(InvalidValue, match="compare of statistics does not take atol"):
        compare(one, one, atol=1.0)
    with pytest.raises(InvalidType, match="which are not two models, two captures or two statistics"):
        compare(one, network())


# -- pictures


def test_the_picture_has_a_row_a_layer_and_a_map_of_dead_and_saturated_channels(tmp_path):
    x = torch.randn(8, 5, 100)
    x[:, 1], x[:, 3], x[0, 4, 0] = 3.0, (10 * x[:, 3]).clamp(-1, 1), math.nan
    y = added([torch.randn(2, 3, 50)], quantiles=0.01, name="y")
    stats = Statistics({"x": added([x], quantiles=0.01), "y": y})
    figure = stats.plot()
    quantiles, _zeros, _dead, channels = figure.axes
    assert [label.get_text() for label in quantiles.get_yticklabels()] == ["x", "y"]
    assert "1 of 5" in [text.get_text() for text in figure.texts]
    cells = channels.images[0].get_array()
    assert cells.tolist() == [[0, 2, 0, 1, 3], [0, 0, 0, -1, -1]]
    figure.savefig(tmp_path / "stats.png")
    assert len(stats.plot("y").axes) == 4
    assert [label.get_text() for label in stats.plot(["y*"]).axes[0].get_yticklabels()] == ["y"]


def test_a_picture_of_many_channels_shows_the_worst_in_each_column():
    x = torch.randn(2, 5000, 10)
    x[:, 4321] = 0
    cells = Statistics({"x": added([x])}).plot().axes[3].images[0].get_array()
    assert cells.shape[1] < 1000
    assert (cells == 2).sum() == 1


def test_pictures_without_channels_or_quantiles_and_mistakes():
    model = network()
    with statistics(model, per="layer", quantiles=None) as stats:
        model(batches()[0])
    assert len(stats.plot().axes) == 3
    with pytest.raises(LayerNotFound, match="'z' has no statistics"):
        stats.plot("z")
    with pytest.raises(InvalidType, match="layers is a int, not a string. Pass a name, a glob"):
        stats.plot(3)
    with pytest.raises(NotCaptured, match="the statistics are empty"):
        Statistics().plot()


# -- ranks

RANKS = """
import json, os, sys
import torch
from torch import nn
from convtap import statistics
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 6, 5))
data = torch.randn(5, 3, 2, 40)
mine = data[:2] if rank == 0 else data[2:] if rank == 1 else data[:0]
with statistics(model) as stats, statistics(model, all_reduce=False, strict=False) as own:
    for x in mine:
        model(x)
found = {name: [layer.count.tolist(), layer.var.tolist(), layer.quantile(0.5).tolist()] for name, layer in stats.items()}
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:  # lines on one standard output would mix
    json.dump([rank, len(own) and own["0"].calls, found], file)
torch.distributed.destroy_process_group()
"""


def test_every_rank_gets_the_whole_also_one_without_data(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        str(script),
        str(tmp_path),
    ]
    root = Path(convtap.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(launch, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(rank, calls) for rank, calls, _ in lines] == [(0, 2), (1, 3), (2, 0)]
    assert lines[0][2] == lines[1][2] == lines[2][2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 6, 5))
    for name, rows in by_hand(model, torch.randn(5, 3, 2, 40)).items():
        count, var, median = lines[0][2][name]
        assert count == [rows.shape[1]] * len(rows)
        np.testing.assert_allclose(var, rows.var(1), rtol=1e-9)
        np.testing.assert_allclose(median, np.quantile(rows, 0.5, axis=1, method="lower"), rtol=0.01)
