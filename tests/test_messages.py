"""What convtap says in situations that are easily mistaken for others: each message names the cause and what to write."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from convtap import (
    CoverageWarning,
    LayerNotFound,
    MemoryLimitExceeded,
    NotCaptured,
    Store,
    StoreError,
    capture,
    extract,
)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv1d(1, 4, 3, padding=1)
        self.c2 = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.c2(F.relu(self.c1(x)))


class Wrapped(nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        self.add_module(name, inner)

    def forward(self, x):
        return next(self.children())(x)


X = torch.randn(2, 1, 20)


# -- names


@pytest.mark.parametrize(
    ("selector", "shown"), [("*.weight", "c1.weight, c2.weight"), ("c1.w*", "c1.weight"), ("*bias", "c1.bias, c2.bias")]
)
def test_a_glob_that_matches_only_parameters_says_so(selector, shown):
    with pytest.raises(LayerNotFound, match=rf"It matches parameters \({shown}\), but a selection names layers"):
        capture(Two(), selector).__enter__()


def test_a_glob_that_matches_a_parameter_that_is_no_kernel_selects_nothing():
    model = Two()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(LayerNotFound, match="no layer matches 'sc.*It matches parameters .scale"):
        capture(model, "sc*").__enter__()


@pytest.mark.parametrize(
    ("model", "asked", "near"),
    [
        (AveragedModel(Two()), "c1", "module.c1"),
        (Wrapped(Two(), "_module"), "c2", "_module.c2"),
        (Wrapped(Wrapped(Two(), "model"), "base_model"), "c1", "base_model.model.c1"),
        (Two(), "module.c1", "c1"),
        (Two(), "base_model.model.c2.base_layer", "c2"),
    ],
)
def test_the_near_name_under_a_wrapper_is_the_same_layers(model, asked, near):
    with pytest.raises(LayerNotFound, match=f"Did you mean '{near}'"):
        capture(model, asked).__enter__()


def test_a_layer_whose_weight_is_another_layers_says_whose_it_is():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 4, 3), nn.Conv1d(1, 4, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return F.conv1d(x, self.a.weight) + F.conv1d(x, self.b.weight)

    model = Tied()
    with (
        pytest.raises(NotCaptured, match="did not run: b.*'b' shares its weight with 'a'"),
        capture(model, ("a", "b")),
    ):
        model(X)


# -- where the model runs


def test_a_coroutine_that_began_before_the_capture_is_called_one():
    model = Two()

    async def late():
        await asyncio.sleep(0.01)
        model(X)

    async def main():
        task = asyncio.create_task(late())
        with capture(model):
            await task

    with pytest.raises(
        NotCaptured, match="coroutine or context that began before the capture.*Open the capture in the"
    ):
        asyncio.run(main())


class RunsTheModel(Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.model(X)[0].detach()


def test_a_model_that_runs_in_workers_of_a_data_loader_is_said_to_be_elsewhere():
    torch.set_num_threads(1)  # the workers are forked
    model = Two()
    with pytest.raises(NotCaptured, match="in another process, such as a data-loader worker"), capture(model):
        assert len(list(DataLoader(RunsTheModel(model), num_workers=1, multiprocessing_context="fork"))) == 2


@pytest.mark.parametrize("kind", ["plain", "subclass"])
def test_a_hook_registered_first_inside_the_capture_has_run_on_what_is_captured(kind):
    class Sub(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)

    layer = {"plain": nn.Conv1d, "subclass": Sub}[kind](1, 2, 3)
    model = nn.Sequential(layer)
    with capture(model) as acts:
        layer.register_forward_hook(lambda module, args, output: output * 0 + 7, prepend=True)
        y = model(X)
    assert torch.equal(acts["0"], y)
    assert bool((y == 7).all())


# -- memory


def test_an_output_that_is_over_the_limit_by_itself_says_only_what_helps_there():
    model = Two()
    with pytest.raises(
        MemoryLimitExceeded, match="the output of 'c1' needs 640 B, which is more than max_bytes=10"
    ) as raised:
        with capture(model, max_bytes=10):
            model(X)
    assert "clear" not in str(raised.value)
    assert "keep='last'" not in str(raised.value)


# -- activations


def test_an_activation_behind_a_residual_sum_is_said_to_be_the_sums():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.relu = nn.Conv1d(1, 1, 3, padding=1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.c(x) + x)

    model = Residual()
    with (
        pytest.raises(NotCaptured, match=r"follows c, so the .* sum\. .*types=nn.ReLU"),
        capture(model, at="activation"),
    ):
        model(X)
    with capture(model, types=nn.ReLU) as acts:
        y = model(X)
    assert torch.equal(acts["relu"], y)


FORWARDS = {
    "safe range": lambda y: F.relu(y.clamp(-0.5, 0.5)),
    "safe range by keyword": lambda y: torch.tanh(torch.clamp(y, min=-0.5, max=0.5)),
    "upper end": lambda y: F.relu(y.clamp_max(0.2)),
    "clamp from zero": lambda y: y.clamp(min=0),
    "clamp_min from zero": lambda y: torch.clamp_min(y, 0),
    "relu6 by hand": lambda y: y.clamp(0, 6),
    "silu by hand": lambda y: y * torch.sigmoid(y),
    "silu by method": lambda y: y.sigmoid().mul(y),
    "silu in place": lambda y: torch.sigmoid(y).mul_(y),
    "mish by hand": lambda y: y * torch.tanh(F.softplus(y)),
    "hard swish by hand": lambda y: F.hardsigmoid(y) * y,
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("keep", ["all", "last"])
def test_the_activation_is_the_whole_of_it_and_no_clamp_for_safety(name, keep):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv1d(1, 3, 3, padding=1)

        def forward(self, x):
            return FORWARDS[name](self.c(x))

    model = Model()
    with torch.no_grad(), capture(model, at="activation", keep=keep, max_bytes=10_000) as acts:
        y = model(X)
        model(X)
    assert [call.name for call in acts.calls()] == ["c"] * (2 if keep == "all" else 1)
    assert torch.equal(acts.calls()[0].output, y)
    assert acts.nbytes == len(acts) * y.numel() * 4
    assert acts.coverage["c"].captured == 2


def test_a_gate_from_another_layer_is_that_layers_activation():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.value, self.gate = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3)

        def forward(self, x):
            return torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))

    model = Gated()
    with capture(model, at="activation") as acts:
        model(X)
    torch.testing.assert_close(acts["value"], torch.tanh(F.conv1d(X, model.value.weight, model.value.bias)).detach())
    torch.testing.assert_close(acts["gate"], torch.sigmoid(F.conv1d(X, model.gate.weight, model.gate.bias)).detach())


# -- files


def damaged(content):
    """Every way in which one entry of a description is missing or of another type, up to two levels down."""
    for key in content:
        yield {other: value for other, value in content.items() if other != key}
        for wrong in (None, 5, "x", [], {}, [[]], math.pi):
            if type(wrong) is not type(content[key]):
                yield {**content, key: wrong}
        if isinstance(content[key], dict) and key == "identity":
            for inner in damaged(content[key]):
                yield {**content, key: inner}


def test_a_damaged_description_is_an_error_of_the_store(tmp_path):
    model = Two()
    extract(model, [X, X], tmp_path / "s", layers=("c1", "c2"), progress=False)
    file = tmp_path / "s" / "store.json"
    good = json.loads(file.read_bytes())
    tried = 0
    for content in ({}, [], None, 7, "x", *damaged(good)):
        file.write_text(json.dumps(content))
        tried += 1
        with contextlib.suppress(StoreError):
            store = Store(tmp_path / "s")
            str(store), store.layers, store.sample(store.ids[0]), store.verify(), len(store)
    assert tried > 100
    for text in (b"", b"{", b"\xff\xfe", json.dumps(good).encode()[:-40]):
        file.write_bytes(text)
        with pytest.raises(StoreError, match="is damaged"):
            Store(tmp_path / "s")


def test_the_warning_of_a_layer_in_another_task_is_a_coverage_warning():
    model = Two()

    async def late():
        await asyncio.sleep(0.01)
        model(X)

    async def main():
        task = asyncio.create_task(late())
        with capture(model) as acts:
            model(X)
            await task
        return acts

    with pytest.warns(CoverageWarning, match="a coroutine or context that began before the capture"):
        acts = asyncio.run(main())
    assert len(acts) == 2
