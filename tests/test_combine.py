"""Captures under other names, joined with each other, and joined along an axis for all layers at once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convtap import Activations, InvalidType, InvalidValue, LayerNotFound, Unsupported, capture, load
from tests.reference import same


class Encoder(nn.Module):
    """One convolution that runs once a pass, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 3, 3, padding=1)
        self.shared = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.shared(self.shared(self.first(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Encoder().eval()


BATCHES = [torch.linspace(0, 1, 20).reshape(2, 1, 10), torch.linspace(2, 3, 30).reshape(3, 1, 10)]


def expected(model, x):
    """The outputs in order, computed without convtap."""

    def conv(layer, x):
        return F.conv1d(x, layer.weight, layer.bias, padding=1)

    with torch.no_grad():
        a = conv(model.first, x)
        b = conv(model.shared, a)
        return {"first": a, "shared#0": b, "shared#1": conv(model.shared, b)}


@pytest.fixture
def acts(model):
    with torch.no_grad(), capture(model) as acts:
        for batch in BATCHES:
            model(batch)
    return acts


# -- all layers at once


def test_cat_without_a_name_joins_the_passes_of_every_layer(model, acts):
    parts = [expected(model, batch) for batch in BATCHES]
    assert same(acts.cat(), {key: torch.cat([part[key] for part in parts]) for key in parts[0]})


def test_cat_without_a_name_has_the_keys_of_samples(acts):
    samples = acts.samples()
    found = acts.cat()
    assert list(found) == list(samples[0])
    for key, value in found.items():
        assert same(value, torch.stack([sample[key] for sample in samples]))


def test_cat_on_time_joins_the_chunks_of_a_stream(model):
    x = BATCHES[0]
    with torch.no_grad(), capture(model, "first") as acts:
        model(x[..., :5])
        model(x[..., 5:])
    chunks = [expected(model, part)["first"] for part in (x[..., :5], x[..., 5:])]
    assert same(acts.cat(dim=-1), {"first": torch.cat(chunks, -1)})


def test_cat_of_a_structure_says_what_to_select_instead():
    model = nn.LSTM(2, 3, batch_first=True)
    with capture(model, types=nn.LSTM) as acts:
        model(torch.zeros(1, 4, 2))
    with pytest.raises(
        Unsupported, match=r"which is not a single tensor that can be joined. Capture one of its tensors"
    ):
        acts.cat()


def test_cat_of_shapes_that_differ_names_the_layer(model):
    with capture(model, "first") as acts:
        model(torch.zeros(1, 1, 5))
        model(torch.zeros(1, 1, 6))
    with pytest.raises(Unsupported, match="the outputs of 'first' cannot be joined along axis 0"):
        acts.cat()


def test_cat_of_nothing_is_an_empty_dict(acts):
    acts.clear()
    assert acts.cat() == {}


# -- other names


def test_renamed_layers_have_the_same_values_under_their_new_names(model, acts):
    found = acts.rename({"first": "early", "shared": "late"})
    assert list(found) == ["early#0", "late#0", "late#1", "early#1", "late#2", "late#3"]
    assert same(found.cat("early"), acts.cat("first"))
    assert list(found.coverage) == ["early", "late"]
    assert found.samples()[4].keys() == {"early", "late#0", "late#1"}
    assert "first" not in found


def test_a_rename_leaves_the_original_as_it_was_and_copies_no_value(acts):
    keys, coverage = list(acts), str(acts.coverage)
    found = acts.rename({"first": "early"})
    found.clear()
    assert (list(acts), str(acts.coverage)) == (keys, coverage)
    again = acts.rename({"first": "early"})
    assert again["early#0"].untyped_storage()._cdata == acts["first#0"].untyped_storage()._cdata


def test_names_can_be_swapped(model, acts):
    found = acts.rename({"first": "shared", "shared": "first"})
    assert same(found.cat("shared"), acts.cat("first"))
    assert same(found.cat("first"), acts.cat("shared"))


def test_renamed_outputs_can_be_saved_pickled_and_drawn_into_a_table(acts, tmp_path):
    found = acts.rename({"first": "early"})
    found.save(tmp_path / "a.safetensors")
    for other in (load(tmp_path / "a.safetensors"), pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert same(dict(other), dict(found))
    assert "early#0" in str(found)


def test_gradients_keep_with_their_renamed_calls(model):
    with capture(model, "first", grads=True) as acts:
        model(BATCHES[0]).sum().backward()
    assert same(acts.rename({"first": "early"}).calls("early")[0].grad, acts.calls("first")[0].grad)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"nothing": "a"}, LayerNotFound, "no output is named 'nothing'"),
        ({"first": "shared"}, InvalidValue, "two layers would be named 'shared'. Give each layer a name of its own"),
        ({"first": 3}, InvalidType, "is not a mapping of names to names. Write for example"),
        (["first"], InvalidType, "is not a mapping of names to names"),
    ],
)
def test_bad_names_change_nothing(acts, names, error, message):
    before = list(acts)
    with pytest.raises(error, match=message):
        acts.rename(names)
    assert list(acts) == before


# -- two captures


def captured(model, batch, **options):
    with torch.no_grad(), capture(model, **options) as acts:
        model(batch)
    return acts


def test_two_captures_joined_are_one_capture_of_both(model, acts):
    first, second = (captured(model, batch) for batch in BATCHES)
    found = first.join(second)
    assert isinstance(found, Activations)
    assert list(found) == list(acts)
    assert same(dict(found), dict(acts))
    assert [(call.key, call.forward) for call in found.calls()] == [(call.key, call.forward) for call in acts.calls()]
    assert same(found.samples(), acts.samples())
    assert str(found.coverage) == str(acts.coverage)
    assert len(first.calls()) == len(second.calls()) == 3


def test_joined_captures_of_other_layers_have_the_layers_of_both(model):
    first, second = captured(model, BATCHES[0], layers="first"), captured(model, BATCHES[0], layers="shared")
    found = first.join(second)
    assert list(found) == ["first", "shared#0", "shared#1"]
    assert list(found.coverage) == ["first", "shared"]


def test_two_models_are_joined_under_names_that_differ(model):
    torch.manual_seed(1)
    other = Encoder().eval()
    names = {"first": "other.first", "shared": "other.shared"}
    found = captured(model, BATCHES[0]).join(captured(other, BATCHES[0]).rename(names))
    assert same(found["first"], expected(model, BATCHES[0])["first"])
    assert same(found["other.first"], expected(other, BATCHES[0])["first"])


def test_a_join_with_something_else_says_what_to_write(acts):
    with pytest.raises(InvalidType, match="is not an Activations. Write acts.join"):
        acts.join(dict(acts))


def test_keys_are_completed_by_tab(acts):
    assert acts._ipython_key_completions_() == list(acts)
