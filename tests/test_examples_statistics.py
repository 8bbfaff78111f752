"""The examples of statistics do what they say: ranges that suit the data, and dead channels that nothing misses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples import calibrate_int8, dead_channels


@pytest.fixture(scope="module")
def calibration():
    torch.manual_seed(0)
    model, generator = calibrate_int8.network(), torch.Generator().manual_seed(0)
    data = [calibrate_int8.signals(32, generator) for _ in range(10)]
    return model, data, calibrate_int8.calibrated(model, data)


def test_the_ranges_are_the_quantiles_of_all_outputs(calibration):
    model, data, stats = calibration
    with torch.no_grad():
        outputs = torch.cat([model[0](x) for x in data]).numpy().reshape(-1)
    low, high = calibrate_int8.ranges(stats, 0.001)["0"]
    expected = np.quantile(outputs, (0.001, 0.999), method="lower")
    assert [low, high] == pytest.approx(expected, rel=0.005)
    assert calibrate_int8.ranges(stats, 0)["0"] == (outputs.min(), outputs.max())


def test_clipped_ranges_have_less_noise_where_there_is_no_click(calibration):
    model, _, stats = calibration
    quiet = torch.randn(32, 1, 400)
    whole, clipped = (
        calibrate_int8.noise_db(model, calibrate_int8.Quantized(model, calibrate_int8.ranges(stats, share)), quiet)
        for share in (0.0, 0.001)
    )
    assert clipped > whole + 3


def test_a_channel_that_fires_in_the_last_batch_only_is_not_dead():
    torch.manual_seed(0)
    model, data = dead_channels.network(), dead_channels.batches(10)
    assert 5 in dead_channels.dead_channels(model, data[:1])["1"]
    dead = dead_channels.dead_channels(model, data)
    assert dead["1"] == [3, 8, 21]
    assert set(range(10, 20)) <= set(dead["3"])
    smaller = dead_channels.without(model, dead)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    for x in data:
        assert torch.allclose(model(x), smaller(x), atol=1e-4)


def test_the_examples_print_what_they_found(capsys):
    calibrate_int8.main()
    dead_channels.main()
    out = capsys.readouterr().out
    assert "clipped at 0.1%" in out
    assert "dead in the whole data set" in out
