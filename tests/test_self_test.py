"""What convtap uses of torch beyond its documentation: tried at the first capture, and replaced where it is gone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from convtap import CoverageWarning, capture
from convtap._torch import call_shim, convolution_key, self_test, weight_marks
from tests.models import FunctionalConvs, TwoParts
from tests.process import run_python
from tests.reference import cloning_hooks, same

X = torch.randn(2, 1, 12)


@pytest.fixture(autouse=True)
def _tested_anew():
    self_test._failures.cache_clear()
    self_test._warn.cache_clear()
    yield
    self_test._failures.cache_clear()
    self_test._warn.cache_clear()


def test_nothing_fails_here_and_nothing_is_left_or_drawn():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert self_test.run() == frozenset()
    assert torch.equal(torch.rand(1), expected)
    assert not convolution_key.is_included()
    assert not weight_marks._marks


def without_key(monkeypatch):
    monkeypatch.setattr(convolution_key, "is_available", lambda: False)


def without_shims(monkeypatch):
    monkeypatch.setattr(call_shim, "_ATTRIBUTE", "_gone")


def both(monkeypatch):
    without_key(monkeypatch)
    without_shims(monkeypatch)


SUBSTITUTES = {
    without_key: "does not reach the convolution key .convtap uses a mode that sees every torch call instead, which is slower",
    without_shims: "the call of a module does not reach its shim .convtap uses hooks on layers instead",
    both: "convolution key .*; the call of a module does not reach its shim",
}


@pytest.mark.parametrize("change", SUBSTITUTES)
def test_what_torch_took_away_is_said_once_and_replaced(change, monkeypatch):
    models = FunctionalConvs(), TwoParts()
    with capture(models[0]) as functions:
        plain = models[0](X)
    with cloning_hooks(models[1]) as modules:
        models[1](X)
    self_test._failures.cache_clear()
    self_test._warn.cache_clear()
    change(monkeypatch)
    with pytest.warns(CoverageWarning, match=f"torch .* differs from the versions .*{SUBSTITUTES[change]}"):
        with capture(models[0]) as acts:
            y = models[0](X)
    assert torch.equal(y, plain)
    assert same(dict(acts), dict(functions))
    with warnings.catch_warnings(), capture(models[1]) as acts:
        warnings.simplefilter("error")
        models[1](X)
        models[1](X)
    assert [(call.name, call.forward) for call in acts.calls()] == [(n, i) for i in range(2) for n, _ in modules]
    assert same([call.output for call in acts.calls(forward=1)], [value for _, value in modules])
    with pytest.raises(ValueError, match="mine"), capture(models[1]):
        handle = models[1].register_forward_hook(raises)
        models[1](X)
    handle.remove()
    with capture(models[1]) as acts:
        models[1](X)
    assert {call.forward for call in acts.calls()} == {0}


def raises(*args):
    raise ValueError("mine")


def test_a_capture_without_a_working_call_stack_does_not_watch_functions(monkeypatch):
    monkeypatch.setattr(self_test.Calls, "modules", lambda calls: iter(()))
    model = TwoParts()
    with (
        pytest.warns(CoverageWarning, match="convtap does not find module calls on the call stack"),
        capture(model) as acts,
    ):
        model(X)
    assert len(acts) == len([m for m in model.modules() if isinstance(m, nn.Conv1d)])


def test_replaced_functions_of_torch_do_not_make_wrong_results():
    script = """
import functools, torch
from torch import nn
import torch.nn.functional as F
for name in ("_call_impl", "_wrapped_call_impl"):
    original = getattr(nn.Module, name)
    def replaced(module, *args, _original=original, **kwargs):
        return _original(module, *args, **kwargs)
    setattr(nn.Module, name, functools.wraps(original)(replaced) if {wraps} else replaced)
nn.Module.__call__ = nn.Module._wrapped_call_impl
from convtap import capture
model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv1d(2, 2, 3))
x = torch.randn(2, 1, 12)
first = F.conv1d(x, model[0].weight, model[0].bias)
with capture(model) as acts:
    for _ in range(2):
        model(x)
assert [(c.name, c.forward) for c in acts.calls()] == [("0", 0), ("2", 0), ("0", 1), ("2", 1)], acts.calls()
assert torch.equal(acts["0#1"], first)
print("well")
"""
    for wraps in (True, False):
        done = run_python(script.replace("{wraps}", str(wraps)))
        assert "well" in done.stdout, done.stderr[-2000:]


GONE = """
import warnings, torch
from torch import nn
from torch.nn import functional as F
import torch.library, torch._ops
del {name}
from convtap import CoverageWarning, capture
weight = nn.Parameter(torch.ones(1, 1, 3))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = weight
    def forward(self, x):
        return F.conv1d(x, self.weight)
model, x = Model(), torch.ones(1, 1, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with capture(model) as acts:
        y = model(x)
assert "convolution key" in str(caught[0].message), caught
assert list(acts) == ["(root)"] and torch.equal(acts["(root)"], y)
print("done")
"""


@pytest.mark.parametrize(
    "name",
    [
        "torch._C._dispatch_key_parse",
        "torch._C._dispatch_has_backend_fallback",
        "torch.library.fallthrough_kernel",
    ],
)
def test_a_name_of_torch_that_is_gone_is_replaced_at_the_first_capture(name):
    done = run_python(GONE.format(name=name))
    assert done.stdout == "done\n", done.stderr
