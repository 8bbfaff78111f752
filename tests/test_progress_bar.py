"""A progress bar never ends a run, whatever standard error is."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from convtap import Store, extract


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


class Bare:
    """A stream with only ``write``."""

    def write(self, text):
        pass


@pytest.mark.parametrize(
    "stream",
    [
        lambda: None,  # under pythonw
        Full,
        closed,
        Bare,
        lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
        lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
    ],
    ids=["none", "full", "closed", "bare", "ascii", "cp1252"],
)
def test_a_run_goes_on_without_a_place_for_its_bar(stream, tmp_path, monkeypatch):
    model, data = nn.Sequential(nn.Conv1d(1, 2, 3)), TensorDataset(torch.randn(8, 1, 20))
    monkeypatch.setattr(sys, "stderr", stream())
    extract(model, data, tmp_path / "größe模", batch_size=4)
    store = Store(tmp_path / "größe模")
    assert not len(store.verify(progress=True))
    monkeypatch.undo()
    assert len(store) == 8
