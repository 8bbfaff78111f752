"""Pickles, saved files and stores that version 0.1.0 wrote are still read. ``data/version-0.1.0.json`` holds some of each."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convtap
from convtap import Store, extract, load
from tests.reference import same

WRITTEN = {
    name: base64.b64decode(text)
    for name, text in json.loads((Path(__file__).parent / "data" / "version-0.1.0.json").read_text()).items()
}
PICKLES = {name: data for name, data in WRITTEN.items() if not name.startswith("a ")}


def model() -> nn.Module:
    """The model whose outputs version 0.1.0 wrote."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(4, 2, 3, stride=2))


def outputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those outputs, computed without convtap."""
    first, _, second = model()
    with torch.no_grad():
        a = F.conv1d(x, first.weight, first.bias, padding=1)
        return {"0": a, "2": F.conv1d(a.relu(), second.weight, second.bias, stride=2)}


X = torch.arange(20.0).reshape(2, 1, 10) / 10
DATA = torch.arange(60.0).reshape(6, 1, 10) / 10


@pytest.mark.parametrize("name", sorted(PICKLES.keys() - {"grads", "dataset", "view", "store", "tapped"}))
def test_a_pickle_is_read_and_prints(name):
    assert str(pickle.loads(PICKLES[name])).strip()


def test_pickled_outputs_are_the_same():
    acts = pickle.loads(PICKLES["acts"])
    assert same(dict(acts), outputs(X))
    assert len(acts.samples()) == 2
    assert acts.coverage["0"].state == "captured"
    call = pickle.loads(PICKLES["call"])
    assert (call.key, call.via) == ("2", "module")
    assert same(call.output, outputs(X)["2"])


def test_pickled_gradients_are_the_same():
    acts = pickle.loads(PICKLES["grads"])
    assert same(acts.calls("2")[0].grad, torch.ones(2, 2, 4))
    assert same(dict(acts), outputs(X))


def test_a_pickled_tapped_model_runs():
    output, taps = pickle.loads(PICKLES["tapped"])(X)
    assert same({name: tap.detach() for name, tap in taps.items()}, outputs(X))
    assert same(output.detach(), outputs(X)["2"])


def test_a_pickled_error_keeps_its_type_and_message():
    error = pickle.loads(PICKLES["error_value"])
    assert type(error) is convtap.InvalidValue
    assert isinstance(error, ValueError)
    assert "at='x'" in str(error)


def test_a_saved_file_is_read(tmp_path):
    path = tmp_path / "acts.safetensors"
    path.write_bytes(WRITTEN["a file"])
    acts = load(path)
    assert same(dict(acts), outputs(X))


@pytest.fixture
def written_store(tmp_path):
    with zipfile.ZipFile(io.BytesIO(WRITTEN["a store"])) as archive:
        archive.extractall(tmp_path / "store")
    return tmp_path / "store"


def test_a_store_is_read_and_gone_on_with(written_store):
    store = Store(written_store)
    for id in range(6):
        batch = outputs(DATA[id - id % 2 :][:2])
        assert same(store.sample(id), {name: value[id % 2] for name, value in batch.items()})
    assert not len(store.verify())
    before = sorted(path.name for path in written_store.rglob("*.safetensors"))
    again = extract(model(), DATA.split(2), written_store, progress=False)
    assert sorted(path.name for path in written_store.rglob("*.safetensors")) == before
    assert len(again) == 6


def test_pickled_stores_and_views_read_the_store(written_store, monkeypatch):
    monkeypatch.chdir(written_store.parent)
    store, view, data = (pickle.loads(PICKLES[name]) for name in ("store", "view", "dataset"))
    expected = Store("store")
    assert same(store.sample(3), expected.sample(3))
    assert same(view[3], expected["0"][3])
    assert len(data) == 6
    assert same(data[3][1], expected.sample(3))
