"""The three ways of the seed question, each against the rewritten network that people are told to use."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

import pytest
import torch
import torch.nn.functional as F

from examples.three_ways import FunctionalNetwork, ModuleListNetwork, captured, keras_network, main
from tests.reference import same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:keras.*")  # inside keras
X = torch.randn(3, 1, 200)


def test_the_module_list_network_gives_what_the_rewritten_one_returns():
    model, y = ModuleListNetwork(), X
    layers, activated = [], []
    for conv in model.convs:  # the rewrite: a forward that returns a list
        layers.append(conv(y).detach())
        y = layers[-1].relu()
        activated.append(y)
    acts = captured(model, X)
    assert list(acts) == [f"convs.{i}" for i in range(5)]
    assert same(list(acts.values()), layers)
    assert same(list(captured(model, X, at="activation").values()), activated)
    assert same(acts.sample(1), {f"convs.{i}": layer[1] for i, layer in enumerate(layers)})


def test_the_functional_network_gives_what_the_collecting_loop_returns():
    model, y, layers = FunctionalNetwork(), X, []
    for weight in model.weights:
        layers.append(F.conv1d(y, weight, padding=2).detach())
        y = layers[-1].relu()
    acts = captured(model, X)
    assert list(acts) == [f"weights.{i}" for i in range(5)]
    assert same(list(acts.values()), layers)
    assert same(list(captured(model, X, at="activation").values()), [layer.relu() for layer in layers])


def test_the_keras_network_gives_what_a_model_with_several_outputs_gives():
    keras = pytest.importorskip("keras", reason="keras comes with the test extra")
    model = keras_network()
    names = [f"conv{i}" for i in range(1, 6)]
    several = keras.Model(model.inputs, [model.get_layer(name).output for name in names])
    batch = X.transpose(1, 2).numpy()
    acts = captured(model, batch)
    assert list(acts) == names
    assert same(list(acts.values()), [output.detach() for output in several(batch)])


def test_the_example_prints_all_three(capsys):
    main()
    out = capsys.readouterr().out
    for text in ("convs.4", "weights.4", "conv5", "'conv5': (200, 16)"):
        assert text in out
