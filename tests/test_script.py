"""TorchScript: scripted, traced, loaded and frozen modules, and Python models with a scripted part."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import NotCaptured, Unsupported, capture, compare, extract, list_layers, timeline
from tests.reference import cloning_hooks, same

X = torch.randn(2, 1, 30)


class Scriptable(nn.Module):
    """Two modules, a shared one, and a functional convolution with a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 3, 3, padding=1)
        self.b = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.ReLU(inplace=True))
        self.kernel = nn.Parameter(torch.randn(3, 3, 1))

    def forward(self, x):
        x = torch.relu_(self.a(x))
        x = self.b(x)
        return F.conv1d(x, self.kernel).relu_()


def traced(model):
    return torch.jit.trace(model, X)


def loaded(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


WAYS = {"scripted": torch.jit.script, "traced": traced, "loaded": loaded}


def expected(model, x=X):
    with torch.no_grad(), cloning_hooks(model) as seen:
        hidden = model(x)
    del hidden
    last = F.conv1d(seen[1][1].relu(), model.kernel).detach()
    return [*seen, ("kernel", last)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_convolutions_in_torchscript_have_their_owners_name_and_the_eager_models_values(way, mode):
    model = Scriptable().eval()
    script = WAYS[way](model)
    for _ in range(3):  # the executor profiles, then optimizes
        with mode():
            plain = script(X)
            with capture(script) as acts:
                y = script(X)
        assert same(list(acts.items()), expected(model))
        assert torch.equal(y, plain)
        assert {call.via for call in acts.calls()} == {"script"}
        assert {call.forward for call in acts.calls()} == {0}


@pytest.mark.parametrize("way", WAYS)
def test_selection_inputs_reduce_and_samples_work_on_torchscript(way):
    model = Scriptable().eval()
    script = WAYS[way](model)
    values = dict(expected(model))
    with capture(script, "b.*", reduce=lambda t: t.mean(-1)) as acts:
        script(X)
    assert same(dict(acts), {"b.0": values["b.0"].mean(-1)})
    with capture(script, ["a", "kernel"], at="input") as acts:
        script(X)
    assert same(dict(acts), {"a": X, "kernel": values["b.0"].relu()})
    with capture(script) as acts:
        script(X)
    assert same(acts.sample(1), {name: value[1] for name, value in values.items()})


def test_a_frozen_module_whose_owners_are_gone_still_gives_its_convolutions():
    model = Scriptable().eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    with capture(frozen) as acts:
        frozen(X)
    assert list(acts) == ["F.conv1d#0", "F.conv1d#1", "F.conv1d#2"]
    assert same([call.output for call in acts.calls()], [value for _, value in expected(model)])


def test_an_optimized_module_is_captured_or_refused_but_never_silently_empty():
    model = Scriptable().eval()
    optimized = torch.jit.optimize_for_inference(torch.jit.script(model))
    optimized(X)
    try:
        with capture(optimized) as acts:
            optimized(X)
    except NotCaptured:
        return
    assert [call.name for call in acts.calls()] == ["F.conv1d"] * 3


@pytest.mark.parametrize("functional", [None, False])
def test_a_python_model_with_scripted_parts_counts_each_convolution_once(functional):
    parts = Scriptable().eval(), nn.Conv1d(3, 2, 3), nn.Conv1d(2, 2, 1)
    model = nn.Sequential(torch.jit.script(parts[0]), parts[1], torch.jit.script(parts[2]), nn.ReLU(inplace=True))
    with capture(model, functional=functional) as acts:
        y = model(X)
    names = ["0.a", "0.b.0", "0.kernel", "1", "2"]
    assert [(call.name, call.via) for call in acts.calls()] == [
        (name, "module" if name == "1" else "script") for name in names
    ]
    assert same([acts[f"0.{name}"] for name, _ in expected(parts[0])], [value for _, value in expected(parts[0])])
    assert torch.equal(acts["1"], parts[1](acts["0.kernel"].relu()))
    assert torch.equal(acts["2"].relu(), y)


def test_what_torchscript_makes_impossible_is_refused_by_name():
    script = torch.jit.script(Scriptable())
    with pytest.raises(
        Unsupported, match=r"detach=False does not work for layers inside TorchScript \(a, b.0\), where values have"
    ):
        capture(script, detach=False).__enter__()
    with pytest.raises(Unsupported, match="stop=True does not work for layers inside TorchScript .*Remove stop=True"):
        capture(script, "a", stop=True).__enter__()


def test_nothing_is_left_on_the_dispatch_stack_when_a_script_raises():
    script = torch.jit.script(Scriptable())
    with pytest.raises(RuntimeError), capture(script):
        script(torch.randn(2, 5, 30))
    assert torch._C._len_torch_dispatch_stack() == 0
    with capture(script) as outer, capture(script, "a") as inner:
        script(X)
    assert (len(outer), len(inner)) == (3, 1)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_list_layers_shows_scripted_layers():
    rows = list_layers(torch.jit.script(Scriptable()), example=X)
    assert [(row.name, row.type, row.used) for row in rows] == [
        ("a", "Conv1d (TorchScript)", "TorchScript × 1"),
        ("b.0", "Conv1d (TorchScript)", "TorchScript × 1"),
        ("kernel", "parameter", "TorchScript × 1"),
    ]


def test_a_frozen_module_which_has_no_mode_is_extracted_and_followed(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 2, 3, stride=2), nn.ReLU(), nn.Conv1d(2, 2, 3)).eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    x = torch.randn(4, 1, 20)
    store = extract(frozen, [x], tmp_path, calls="keys", progress=False)
    with torch.no_grad():
        first = F.conv1d(x, model[0].weight, model[0].bias, stride=2)
        second = F.conv1d(first.relu(), model[2].weight, model[2].bias)
    for key, expected in (("F.conv1d#0", first), ("F.conv1d#1", second)):
        torch.testing.assert_close(torch.stack([store[key][i] for i in range(4)]), expected)
    times = timeline(frozen, x)
    assert [(times[f"F.conv1d#{i}"].stride, times[f"F.conv1d#{i}"].receptive_field) for i in (0, 1)] == [(2, 3), (2, 7)]
    with pytest.raises(Unsupported, match="side a is TorchScript"):
        compare(frozen, frozen, example=x)
