"""Every warning stands at the user's line: the ``with`` statement or the call that led to it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from convtap import CoverageWarning, capture, extract, finite, statistics
from tests.structure import MODULES


class Idle(nn.Module):
    """A model with a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.used = nn.Conv1d(1, 2, 3)
        self.idle = nn.Conv1d(1, 2, 3)

    def forward(self, x):
        return self.used(x)


X = torch.zeros(2, 1, 8)


def in_capture(tmp_path):
    with capture(Idle(), strict=False):
        pass


def in_a_function_that_is_decorated(tmp_path):
    @torch.no_grad()
    def run():
        with capture(Idle(), strict=False):
            pass

    run()


def in_extract(tmp_path):
    extract(Idle(), [X], tmp_path, ["used", "idle"], progress=False)


def in_extract_of_a_model_with_state(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return self.conv(x + self.count)

    extract(Counts().eval(), TensorDataset(X.repeat(4, 1, 1)), tmp_path, batch_size=2, part=(0, 2), progress=False)


def in_finite(tmp_path):
    model = Idle()
    with finite(model, backward=True):
        model(X)


def in_statistics(tmp_path):
    with statistics(Idle(), strict=False):
        pass


@pytest.mark.parametrize(
    "case",
    [
        in_capture,
        in_a_function_that_is_decorated,
        in_extract,
        in_extract_of_a_model_with_state,
        in_finite,
        in_statistics,
    ],
)
def test_a_warning_stands_at_the_line_of_the_user(case, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case(tmp_path)
    found = [warning for warning in caught if warning.category is CoverageWarning]
    assert found
    assert {warning.filename for warning in found} == {__file__}


def test_no_other_module_counts_frames():
    counting = {name for name, path in MODULES.items() if "stacklevel=" in path.read_text()}
    assert counting == {"_errors", "_capture.tapped"}  # a tapped model warns in a trace, among frames of the compiler
