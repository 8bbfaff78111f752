"""What the tests of training loops share: a recording model, the histograms in a folder, and the same ones by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor, nn


def recording(classifier: type[nn.Module], layers: str) -> type[Any]:
    """A subclass that notes, in each training pass, its input and a copy of the network's state, and can fail at one."""

    class Recorded(classifier):
        fails_at: int | None = None

        def __init__(self) -> None:
            super().__init__()
            self.passes: list[tuple[Tensor, dict[str, Tensor]]] = []

        @functools.wraps(classifier.forward)  # the Trainer reads its signature
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.training:
                state = {name: tensor.clone() for name, tensor in getattr(self, layers).state_dict().items()}
                self.passes.append((x.clone(), state))
            found = super().forward(x, *args, **kwargs)
            if self.fails_at == len(self.passes) - 1:
                raise RuntimeError("halfway")
            return found

    return Recorded


def convolutions(x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The outputs of both convolutions of the examples' networks, with functions."""
    first = F.conv1d(x, state["0.weight"], state["0.bias"], stride=2, padding=3)
    return first, F.conv1d(first.relu(), state["2.weight"], state["2.bias"], stride=2, padding=2)


def written(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """The histograms in the event files of a folder: {tag: [(step, histogram)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    return {
        tag: [(event.step, event.histogram_value) for event in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }


def assert_histograms_are_of(folder: Path, layers: str, passes: list[tuple[int, Any]]) -> None:
    """Compares all histograms in a folder with both convolutions' outputs in ``passes``: (step, recorded pass)."""
    found, names = written(folder), (f"{layers}.0", f"{layers}.2")
    assert sorted(found) == list(names)
    outputs = [convolutions(*recorded) for _, recorded in passes]
    for name, of_layer in zip(names, zip(*outputs, strict=True), strict=True):
        assert [step for step, _ in found[name]] == [step for step, _ in passes]
        for (_, histogram), output in zip(found[name], of_layer, strict=True):
            assert_is_of(histogram, output)


def assert_is_of(histogram: Any, output: Tensor) -> None:
    """Compares a histogram with the values that it has to be of."""
    values = output.detach().double().numpy().reshape(-1)
    assert (histogram.num, histogram.min, histogram.max) == (values.size, values.min(), values.max())
    assert [histogram.sum, histogram.sum_squares] == pytest.approx([values.sum(), (values**2).sum()])
    counts = [((low <= values) & (values < high)).sum() for low, high in bins(histogram.bucket_limit)]
    assert sum(counts) == values.size
    np.testing.assert_array_equal(histogram.bucket, counts)


def bins(limits: list[float]) -> list[tuple[float, float]]:
    """The ranges of a histogram's buckets, of which it has the upper limits."""
    return list(zip([-np.inf, *limits[:-1]], limits, strict=True))
