"""Cases that once went wrong: who else holds an output, whose memory it is, and who owns a weight right now."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from convtap import CoverageWarning, ModifiedInPlace, NotCaptured, StoreError, Unsupported, capture, load
from tests.reference import same

X = torch.randn(2, 1, 16)


# -- detach=False never changes what the model computes


class Stashes(nn.Conv1d):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def test_an_output_that_the_layer_keeps_is_not_swapped():
    model = nn.Sequential(Stashes(1, 4, 3))
    model.forward = lambda x: (F.relu_(model[0](x)), model[0].last.sum())[1]
    plain = model(X)
    with capture(model, detach=False) as acts:
        y = model(X)
    assert torch.equal(y, plain)
    with pytest.raises(ModifiedInPlace):
        acts["0"]


class StashesAPart(nn.Conv1d):
    def __init__(self, kind):
        super().__init__(1, 4, 3)
        self.kind = kind

    def forward(self, x):
        y = super().forward(x)
        self.last = y + 1
        return self.kind((y, self.last)) if self.kind is not dict else {0: y, 1: self.last}


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_a_part_of_an_output_that_the_layer_keeps_is_not_swapped(kind):
    model = nn.Sequential(StashesAPart(kind))
    model.forward = lambda x: (F.relu_(model[0](x)[1]), model[0].last.sum())[1]
    plain = model(X)
    with capture(model, detach=False) as acts:
        y = model(X)
    assert torch.equal(y, plain)
    with pytest.raises(ModifiedInPlace):
        acts["0"]


def test_an_output_that_a_users_hook_keeps_is_not_swapped():
    model, kept = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(inplace=True)), []
    model[0].register_forward_hook(lambda m, args, y: kept.append(y))
    model(X)
    plain = kept.pop().detach().clone()
    with capture(model, detach=False, strict=False):
        model(X)
    assert torch.equal(kept[0].detach(), plain)


@dataclass
class Named:
    y: torch.Tensor


class Odd(nn.Module):
    """Returns what a copy would not equal."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv1d(1, 4, 3), kind

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "max":
            return y.max(-1)
        if self.kind == "list subclass":
            return type("Mine", (list,), {"tag": 7})([y])
        named = Named(y)
        named.extra = 7
        return named


@pytest.mark.parametrize("kind", ["max", "list subclass", "dataclass with more"])
def test_the_model_gets_the_very_structure_that_the_layer_returned(kind):
    model = nn.Sequential(Odd(kind))
    with capture(model, "0", detach=False) as acts:
        y = model(X)
    if kind == "max":
        assert torch.equal(y.values, acts["0"][0])
    else:
        assert getattr(y, "tag", None) == 7 or y.extra == 7


# -- memory that is not the layer's own


def test_an_output_that_is_an_input_leaves_the_users_memory_as_it_was():
    buffer = torch.zeros(2, 1, 16)
    view = buffer.numpy()
    model = nn.Sequential(nn.Identity(), nn.Conv1d(1, 1, 1))
    with capture(model, types=nn.Module) as acts:
        model(buffer)
    buffer.add_(1)
    assert view.min() == 1
    view[:] = 7
    assert acts["0"].abs().sum() == 0


class GivesABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4, 8))
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.table[:2], self.weight


def test_buffers_and_parameters_that_a_module_returns_are_copied():
    model = nn.Sequential(GivesABuffer())
    table, weight = model[0].table.numpy(), model[0].weight.detach().numpy()
    with capture(model, "0") as acts:
        model(X)
    model[0].table.add_(1)
    model[0].weight.data.add_(1)
    assert table.min() == 1
    assert weight.min() == 1
    assert acts["0"][0].abs().sum() + acts["0"][1].abs().sum() == 0


# -- threads


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3))

    def forward(self, x):
        return F.conv1d(F.conv1d(self.a(x), self.kernel), self.c.weight)


def test_functions_are_captured_in_a_thread_that_inherits_the_block():
    model = Mixed()

    async def run():
        with capture(model) as acts:
            await asyncio.to_thread(model, X)
            model(X)
        return acts

    acts = asyncio.run(run())
    assert [call.name for call in acts.calls()] == ["a", "kernel", "c"] * 2
    assert torch._C._len_torch_function_stack() == 0
    left = []
    thread = threading.Thread(target=lambda: left.append(torch._C._len_torch_function_stack()))
    thread.start()
    thread.join()
    assert left == [0]


def test_calls_in_another_thread_are_never_lost_without_a_word():
    model = Mixed()
    with pytest.warns(CoverageWarning, match="not in this capture. The model ran in another thread.*other-1"):
        with capture(model) as acts:
            model(X)
            thread = threading.Thread(target=model, args=(X,), name="other-1")
            thread.start()
            thread.join()
    assert len(acts) == 3


# -- methods, owners, computed weights


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3)

    def encode(self, x):
        return F.conv1d(self.a(x), self.b.weight * 2)

    def training_step(self, x):
        return self.encode(x).mean() + sum(p.pow(2).sum() for p in self.parameters())


def test_a_method_of_the_model_is_a_forward_like_any_other():
    model = Methods()
    with capture(model) as acts:
        y = model.encode(X)
    assert list(acts) == ["a", "F.conv1d"]
    assert torch.equal(acts["F.conv1d"], y)
    with capture(model) as acts:
        model.training_step(X).backward()
    assert list(acts) == ["a", "F.conv1d"]
    assert acts.coverage.bypassed == []


def test_parameters_in_one_storage_have_their_own_names():
    model = nn.ModuleDict({"a": nn.Conv1d(1, 2, 3), "b": nn.Conv1d(2, 2, 3)})
    flat = parameters_to_vector(model.parameters()).detach().clone()
    vector_to_parameters(flat, model.parameters())
    model.forward = lambda x: F.conv1d(F.conv1d(x, model["a"].weight.detach()), model["b"].weight.view(2, 2, 3))
    with capture(model) as acts:
        model(X)
    assert list(acts) == ["a", "b"]


def test_owners_are_those_of_the_moment():
    model = Mixed()
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with capture(model) as acts:
        torch.func.functional_call(model, other, (X,))
        model(X)
        model.kernel = nn.Parameter(torch.randn(4, 4, 3))
        model(X)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        model(X)
    assert [call.name for call in acts.calls()] == ["a", "kernel", "c"] * 4


def test_a_selected_layer_whose_weight_is_computed_says_what_to_add():
    model = nn.ModuleDict({"a": nn.Conv1d(1, 4, 3), "b": nn.Conv1d(4, 4, 3)})
    model.forward = lambda x: F.conv1d(model["a"](x), model["b"].weight * 2)
    for layers in (["a", "b*"], ["a", "b"]):
        with pytest.raises(
            NotCaptured, match=r"the convolution of b ran with a weight computed from its own.*'F.conv1d'"
        ):
            with capture(model, layers):
                model(X)
    with capture(model, ["a", "b", "F.conv1d"]) as acts:
        model(X)
    assert list(acts) == ["a", "F.conv1d"]


def test_a_pruned_layer_that_is_called_is_captured_once():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 2, 3))
    prune.random_unstructured(model[1], "weight", 0.5)
    with capture(model) as acts:
        y = model(X)
    assert list(acts) == ["0", "1"]
    assert torch.equal(acts["1"], y)


class Inner(nn.Conv1d):
    def __init__(self):
        super().__init__(4, 4, 1)
        self.inner = nn.Conv1d(1, 4, 3)
        self.mix = nn.Parameter(torch.randn(4, 4, 3))

    def forward(self, x):
        return super().forward(F.conv1d(F.conv1d(x, self.inner.weight), self.mix))


def test_another_layers_convolution_inside_a_convolution_is_captured():
    model = nn.Sequential(Inner())
    with capture(model) as acts:
        model(X)
    assert list(acts) == ["0.inner", "0"]
    assert torch.equal(acts["0.inner"], F.conv1d(X, model[0].inner.weight))


def test_stop_waits_for_every_kernel_that_a_glob_selects():
    class Kernels(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernels = nn.ParameterList(torch.randn(1, 1, 3) for _ in range(3))
            self.last = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            for kernel in self.kernels:
                x = F.conv1d(x, kernel)
            return self.last(x)

    model = Kernels()
    with capture(model, "kernels.*", stop=True) as acts:
        model(X)
    assert list(acts) == ["kernels.0", "kernels.1", "kernels.2"]


# -- reduce, tracing, dtypes


def test_reduce_does_not_disturb_checkpointing():
    conv = nn.Conv1d(1, 4, 3)
    model = nn.ModuleDict({"conv": conv})
    model.forward = lambda x: checkpoint(lambda x: conv(x).relu(), x, use_reentrant=False)
    model(X).sum().backward()
    plain = conv.weight.grad.clone()
    for detach in (True, False):
        conv.weight.grad = None
        with capture(model, detach=detach, reduce=lambda t: t.pow(2).mean(-1)) as acts:
            model(X).sum().backward()
        assert torch.equal(conv.weight.grad, plain)
    torch.testing.assert_close(acts["conv"], conv(X).pow(2).mean(-1))


def test_what_is_traced_inside_a_block_is_the_model_alone():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    with capture(model, detach=False, strict=False):
        traced = torch.jit.trace(model, X)
    assert "lazy_clone" not in str(traced.inlined_graph)
    with pytest.raises(NotCaptured), capture(model):
        exported = torch.export.export(model, (X,), strict=False)
    assert "clone" not in str(exported.graph)


def test_a_complex_output_is_not_cast_to_its_real_part():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    with pytest.raises(ValueError, match="layer '0': dtype=torch.float16 would drop the imaginary part"):
        with capture(model, reduce=torch.fft.fft, dtype=torch.float16):
            model(X)


def test_a_reduce_that_runs_a_layer_of_the_model_does_not_record_it():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 1))
    with capture(model, reduce=lambda t: model[1](t).mean(-1)) as acts:
        model(X)
    assert list(acts) == ["0", "1"]


def test_statistics_of_integers_and_of_eight_bit_floats():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    for dtype in (torch.int64, torch.float8_e4m3fn, torch.bool):
        with capture(model, reduce=lambda t, dtype=dtype: t.to(dtype)) as acts:
            model(X)
        wide = acts["0"].to(torch.float64).numpy()
        np.testing.assert_allclose(acts.summary(stats=True).rows[0][5:8], [wide.min(), wide.mean(), wide.max()])


# -- keys, passes, files


def test_numbered_keys_are_apart_before_the_mapping_is_read():
    model = nn.ModuleDict({"a": nn.Conv1d(1, 1, 1), "a#0": nn.Conv1d(1, 1, 1)})
    with capture(model) as acts:
        model["a"](X)
        model["a"](X)
        model["a#0"](X)
    assert [call.key for call in acts.calls()] == ["a##0", "a##1", "a#0"]


def test_a_root_that_is_tapped_itself_is_in_its_own_pass():
    model = nn.Conv1d(1, 1, 1)
    with capture(model) as acts:
        model(X)
        model(X)
    assert [call.forward for call in acts.calls()] == [0, 1]
    both = nn.Sequential(nn.Conv1d(1, 1, 1))
    with capture(both, types=nn.Module) as acts:
        both(X)
    assert [call.forward for call in acts.calls()] == [0, 0]
    assert len(acts.samples()) == 2


def test_a_part_of_an_output_with_another_layers_name_is_refused_in_samples():
    class Two(nn.Conv1d):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Module()
    model.add_module("a", Two(1, 1, 1))
    model.add_module("a[0]", nn.Conv1d(1, 1, 1))
    model.forward = lambda x: model.get_submodule("a[0]")(model.a(x)[0])
    with capture(model, "a") as acts:
        model(X)
    assert list(acts.sample(0)) == ["a[0]", "a[1]"]
    with capture(model) as acts:
        model(X)
    with pytest.raises(Unsupported, match=r"two outputs have the key 'a\[0\]'"):
        acts.sample(0)


def test_numeric_and_text_keys_of_a_dict_stay_apart_on_disk(tmp_path):
    class Keys(nn.Conv1d):
        def forward(self, x):
            y = super().forward(x)
            return {0: y, "0": y * 2}

    model = nn.Sequential(Keys(1, 1, 1))
    model.forward = lambda x: model[0](x)[0]
    with capture(model) as acts:
        model(X)
    acts.save(tmp_path / "a")
    assert same(load(tmp_path / "a")["0"], acts["0"])


def test_a_file_with_foreign_metadata_is_a_store_error(tmp_path):
    from safetensors.torch import save_file

    for text in ("{", "[]", '{"format": 1}', '{"format": 1, "calls": [{}], "layers": [], "inputs": []}'):
        save_file({"x": X}, tmp_path / "a", metadata={"convtap": text})
        with pytest.raises(StoreError):
            load(tmp_path / "a")


# -- arguments


def test_a_generator_of_names_selects_like_a_list():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 3))
    with capture(model, (name for name in ["0", "2"])) as acts:
        model(X)
    assert list(acts) == ["0", "2"]


@pytest.mark.parametrize("option", ["copy", "detach", "strict", "functional", "stop"])
def test_switches_take_true_and_false_only(option):
    with pytest.raises(ValueError, match=f"{option}='no' is invalid. Pass one of"):
        capture(nn.Conv1d(1, 1, 1), "(root)", **{option: "no"})


def test_a_parameter_that_no_function_used_is_said_to_be_just_that():
    model = Mixed()
    with pytest.raises(NotCaptured, match="no F.conv1d call used a.bias"), capture(model, "a.bias"):
        model(X)


def test_an_error_inside_torchscript_keeps_its_text():
    script = torch.jit.script(nn.Sequential(nn.Conv1d(1, 2, 3)))
    with pytest.raises(TypeError, match="layer '0': reduce returned a float"):
        with capture(script, reduce=lambda t: 1.0):
            script(X)


def test_a_structure_in_a_transform_still_needs_detach():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    with pytest.raises(Unsupported), capture(model, detach=False):
        torch.func.vmap(model)(X)
