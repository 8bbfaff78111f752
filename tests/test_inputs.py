"""``inputs=True`` keeps the input of each call beside its output, as it was when the layer ran."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convtap import InvalidValue, MemoryLimitExceeded, NotCaptured, capture, load
from tests.reference import same

X = torch.linspace(-1, 1, 24).reshape(2, 1, 12)


class Mixed(nn.Module):
    """A plain layer before an in-place activation, one with weight normalization, and a convolution as a function."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv1d(1, 2, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3, padding=1))
        self.loose = nn.Parameter(torch.randn(2, 2, 3))

    def forward(self, x):
        x = F.relu_(self.plain(x))
        x = F.relu_(self.normed(x))
        y = F.conv1d(x, self.loose)
        x.zero_()  # after it was the input of the function
        return y


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()


def expected(model):
    """The inputs in order, computed without convtap."""
    with torch.no_grad():
        a = F.conv1d(X, model.plain.weight, model.plain.bias, padding=1).relu()
        b = F.conv1d(a, model.normed.weight, model.normed.bias, padding=1).relu()
    return {"plain": X, "normed": a, "loose": b}


def test_inputs_are_those_that_the_layers_had_when_they_ran(model):
    with torch.no_grad(), capture(model, inputs=True) as acts:
        model(X)
    assert same(acts.inputs, expected(model))
    assert same({call.key: call.input for call in acts.calls()}, expected(model))


def test_outputs_are_those_of_a_capture_without_inputs(model):
    with torch.no_grad(), capture(model) as plain:
        y = model(X)
    with torch.no_grad(), capture(model, inputs=True) as acts:
        z = model(X)
    assert same(dict(acts), dict(plain))
    assert same(y, z)


def test_an_input_that_the_layer_itself_overwrites_is_kept_as_it_was():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True))
    with torch.no_grad(), capture(model, inputs=True, types=nn.ReLU) as acts:
        model(X)
    with torch.no_grad():
        assert same(acts.inputs["1"], F.conv1d(X, model[0].weight, model[0].bias))


def test_a_layer_that_runs_several_times_has_an_input_for_each_run():
    conv = nn.Conv1d(1, 1, 3, padding=1)
    model = nn.Sequential(conv, conv)
    with torch.no_grad(), capture(model, inputs=True) as acts:
        model(X)
    with torch.no_grad():
        assert same(list(acts.inputs.values()), [X, F.conv1d(X, conv.weight, conv.bias, padding=1)])


def test_parts_of_an_output_have_the_input_of_their_layer():
    model = nn.LSTM(2, 3, batch_first=True)
    x = torch.randn(1, 4, 2)
    with torch.no_grad(), capture(model, ["(root)[0]", "(root)[1][0]"], types=nn.LSTM, inputs=True) as acts:
        model(x)
    assert all(same(call.input, x) for call in acts.calls())
    assert len(acts) == 2


@pytest.mark.parametrize("options", [{"keep": "last"}, {"every": 2}, {"functional": False, "strict": False}])
def test_other_options_hold_with_inputs(model, options):
    with torch.no_grad(), capture(model, inputs=True, **options) as acts:
        for scale in (1, 2, 3):
            model(scale * X)
    first = [call for call in acts.calls() if call.name == "plain"]
    scales = {"keep": [3], "every": [1, 3]}.get(next(iter(options)), [1, 2, 3])
    assert same([call.input for call in first], [scale * X for scale in scales])


def test_reduce_and_dtype_apply_to_inputs(model):
    with (
        torch.no_grad(),
        capture(model, "plain", inputs=True, reduce=lambda t: t.mean(-1), dtype=torch.float64) as acts,
    ):
        model(X)
    assert same(acts.inputs["plain"], X.mean(-1).double())


def test_with_detach_false_the_input_is_in_the_graph_of_the_loss(model):
    x = X.clone().requires_grad_()
    with capture(model.plain, inputs=True, detach=False) as acts:
        loss = model.plain(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, acts.calls()[0].input)
    (reference,) = torch.autograd.grad(F.conv1d(x, model.plain.weight, model.plain.bias, padding=1).square().sum(), x)
    assert torch.allclose(gradient, reference)


def test_inputs_come_back_from_files_and_pickles(model, tmp_path):
    with torch.no_grad(), capture(model, inputs=True) as acts:
        model(X)
    acts.save(tmp_path / "a.safetensors")
    for copy in (load(tmp_path / "a.safetensors"), pickle.loads(pickle.dumps(acts)), acts.rename({"plain": "p"})):
        assert same(list(copy.inputs.values()), list(expected(model).values()))


def test_inputs_count_in_bytes_and_in_the_limit(model):
    with torch.no_grad(), capture(model) as plain:
        model(X)
    with torch.no_grad(), capture(model, inputs=True) as acts:
        model(X)
    assert acts.nbytes == plain.nbytes + sum(value.nbytes for value in expected(model).values())
    with pytest.raises(MemoryLimitExceeded), torch.no_grad(), capture(model, inputs=True, max_bytes=plain.nbytes + 10):
        model(X)


def test_scripted_and_compiled_models_have_inputs():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 3)).eval()
    with torch.no_grad():
        wanted = [X, F.conv1d(X, layers[0].weight, layers[0].bias).relu()]
        for model in (torch.jit.script(layers), torch.compile(layers, backend="eager")):
            with capture(model, inputs=True) as acts:
                model(X)
            assert same(list(acts.inputs.values()), wanted)


def test_nothing_is_left_on_the_model(model):
    before = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad(), capture(model, inputs=True):
        model(X)
    assert [module.__dict__.keys() for module in model.modules()] == [state.keys() for state in before]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_capture_without_inputs_says_how_to_get_them(model):
    with torch.no_grad(), capture(model) as acts:
        model(X)
    with pytest.raises(NotCaptured, match=r"was not captured.* with capture\(model, inputs=True\)"):
        acts.inputs  # noqa: B018


@pytest.mark.parametrize("at", ["input", "activation"])
def test_inputs_beside_something_else_than_outputs_are_refused(model, at):
    with pytest.raises(InvalidValue, match="inputs=True does not work with at=.* Remove at="):
        capture(model, inputs=True, at=at)
