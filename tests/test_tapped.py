"""tapped: right in eager, compiled and exported form, and loud where a layer does not come out."""

import copy
import gc
import io
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import convtap
from convtap import LayerNotFound, NotCaptured, Unsupported, capture, list_layers
from convtap._capture.tapped import tapped
from convtap._errors import ConvtapError, InvalidType, InvalidValue

# torch's own code calls what torch itself deprecates, in compilation and in export; nothing of it is ours to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


class InplaceReluTwice(nn.Module):
    """Two convolutions, each overwritten in place after it ran; the second one runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x, scale=1.0):
        y = self.relu(self.first(x))
        y = self.relu(self.second(y))
        return torch.relu_(self.second(y)).mean(-1) * scale


class FunctionalSecond(InplaceReluTwice):
    """Uses the weight of its second convolution in a function call, so that its hooks never fire."""

    def forward(self, x):
        return F.conv1d(self.relu(self.first(x)), self.second.weight, padding=1)


class RaisesHalfway(InplaceReluTwice):
    """Raises after the first convolution, if told to."""

    fails = False

    def forward(self, x):
        y = self.first(x)
        if self.fails:
            raise RuntimeError("halfway")
        return self.second(y)


class BreaksTheGraph(InplaceReluTwice):
    """Has a place in its forward that Dynamo cannot trace through."""

    def forward(self, x):
        y = self.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.relu(self.second(y))


class Checkpointed(InplaceReluTwice):
    """Recomputes its forward in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class PairConv(nn.Conv1d):
    """Returns its output and a mask, as some speech models' convolutions do."""

    def forward(self, x):
        y = super().forward(x)
        return y, y > 0


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    return torch.randn(2, 2, 16)


def by_hand(model, *args, at="output", **kwargs):
    """The reference: every convolution's clone, from plain hooks written here. Returns the output and (name, tensor)s."""
    found = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and at == "output":
            hook = lambda _, __, out, name=name: found.append((name, out.clone()))  # noqa: E731
            handles.append(module.register_forward_hook(hook))
        elif isinstance(module, nn.Conv1d):
            hook = lambda _, given, name=name: found.append((name, given[0].clone()))  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    output = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return output, found


def numbered(found):
    """Keys written out by hand for InplaceReluTwice: one call of the first layer, two of the second."""
    assert [name for name, _ in found] == ["first", "second", "second"]
    return dict(zip(["first", "second#0", "second#1"], [value for _, value in found], strict=True))


def assert_same(result, model, *args, atol=0.0, **kwargs):
    output, found = by_hand(model, *args, **kwargs)
    expected = numbered(found)
    assert list(result[1]) == list(expected)
    torch.testing.assert_close(result[0], output, atol=atol, rtol=0)
    for key, value in expected.items():
        torch.testing.assert_close(result[1][key], value, atol=atol, rtol=0)


# -- eager


def test_values_and_keys_are_those_of_cloning_hooks_in_spite_of_inplace_relu(x):
    model = InplaceReluTwice()
    assert_same(tapped(model)(x), model, x)
    assert_same(tapped(model)(x, scale=2.0), model, x, scale=2.0)


def test_inputs_are_what_the_layers_were_given(x):
    model = InplaceReluTwice()
    assert_same(tapped(model, at="input")(x), model, x, at="input")


def test_keys_are_those_of_a_capture(x):
    model = InplaceReluTwice()
    with capture(model) as acts:
        model(x)
    _, found = tapped(model)(x)
    assert list(found) == list(acts)


def test_a_number_that_could_be_a_name_gets_another_separator(x):
    model = nn.Sequential()
    conv = nn.Conv1d(2, 2, 1)
    model.add_module("c", conv)
    model.add_module("c#0", nn.Conv1d(2, 2, 1))
    model.add_module("again", conv)
    _, acts = tapped(model)(x)
    assert list(acts) == ["c##0", "c#0", "c##1"]


def test_only_selected_layers_come_out_and_a_wrong_name_is_an_error_with_the_nearest(x):
    model = InplaceReluTwice()
    assert list(tapped(model, "second")(x)[1]) == ["second#0", "second#1"]
    assert list(tapped(model, types=nn.ReLU)(x)[1]) == ["relu#0", "relu#1"]
    with pytest.raises(LayerNotFound, match="Did you mean 'second'"):
        tapped(model, "secand")


def test_reduce_and_dtype_are_applied_to_floating_point_tensors_only(x):
    model = nn.Sequential(PairConv(2, 4, 3))
    _, acts = tapped(model, reduce=lambda t: t[:, :1], dtype=torch.float64)(x)
    kept, mask = acts["0"]
    expected, expected_mask = model(x)
    assert kept.dtype == torch.float64
    assert mask.dtype == torch.bool
    torch.testing.assert_close(kept, expected[:, :1].double(), atol=0, rtol=0)
    assert torch.equal(mask, expected_mask[:, :1])


def test_a_complex_output_is_cast_to_complex_types_and_to_no_others(x):
    model = InplaceReluTwice()
    both = tapped(model, "first", reduce=torch.fft.fft, dtype=torch.float16)
    with pytest.raises(InvalidValue, match="layer 'first': dtype=torch.float16 would drop the imaginary part"):
        both(x)
    with pytest.raises(Exception, match="dtype=torch.float16 would drop the imaginary part"):
        torch.compile(both, backend="eager", fullgraph=True)(x)
    _, acts = tapped(model, "first", reduce=torch.fft.fft, dtype=torch.complex128)(x)
    expected = torch.fft.fft(F.conv1d(x, model.first.weight, model.first.bias, padding=1)).to(torch.complex128)
    torch.testing.assert_close(acts["first"], expected)


def test_a_reduced_view_keeps_only_its_own_bytes(x):
    _, acts = tapped(InplaceReluTwice(), "first", reduce=lambda t: t[:, :1])(x)
    assert acts["first"].untyped_storage().nbytes() == 2 * 1 * 16 * 4  # (B, 1, T) in float32, of (B, 4, T)


def test_a_reduce_that_writes_in_place_does_not_change_the_model(x):
    model = InplaceReluTwice()
    expected = model(x)
    output, _ = tapped(model, reduce=lambda t: t.zero_())(x)
    assert torch.equal(output, expected)


def test_a_failing_reduce_names_the_layer_and_the_shape(x):
    with pytest.raises(ConvtapError, match=r"layer 'first': reduce failed on the value of shape \(2, 4, 16\): .*boom"):
        tapped(InplaceReluTwice(), reduce=_boom)(x)
    with pytest.raises(InvalidType, match=r"layer 'first': reduce returned a float, which is not a tensor"):
        tapped(InplaceReluTwice(), reduce=lambda t: 1.0)(x)


def _boom(tensor):
    raise ValueError("boom")


def test_a_plain_call_of_the_model_is_neither_in_the_next_result_nor_kept_alive(x):
    model = InplaceReluTwice()
    both = tapped(model)
    both(x)
    alive = []
    handle = model.first.register_forward_hook(lambda _, __, out: alive.append(weakref.ref(out)))
    model(x)
    handle.remove()
    assert alive[0]() is None
    assert_same(both(x), model, x)


def test_an_exception_halfway_leaves_nothing_stale(x):
    model = RaisesHalfway()
    both = tapped(model)
    model.fails = True
    with pytest.raises(RuntimeError, match="halfway"):
        both(x)
    model.fails = False
    assert both._sink.calls is None
    model(x)
    _, found = both(x)
    assert list(found) == ["first", "second"]
    assert torch.equal(found["first"], model.first(x))


def test_two_tapped_modules_on_one_model_do_not_see_each_other(x):
    model = InplaceReluTwice()
    one, other = tapped(model, "first"), tapped(model, "second")
    assert list(one(x)[1]) == ["first"]
    assert list(other(x)[1]) == ["second#0", "second#1"]


def test_several_on_one_model_are_compiled_and_run_side_by_side(x):
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU(inplace=True), nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        first, both = tapped(model, "0"), tapped(model)
        one, other = (torch.compile(part, backend="eager", fullgraph=True) for part in (first, both))

        def run():
            with torch.no_grad():
                return [list(part(x)[1]) for part in (one, other, first, both)]

        for _ in range(2):
            assert run() == [["0"], ["0", "2"], ["0"], ["0", "2"]]
        last = torch.compile(tapped(model, "2"), backend="eager", fullgraph=True)
        assert torch.equal(last(x)[1]["2"], model(x))
        results = []
        thread = threading.Thread(target=lambda: results.append(run()))
        thread.start()
        thread.join()
        assert results == [[["0"], ["0", "2"], ["0"], ["0", "2"]]]


def test_two_threads_do_not_see_each_other():
    """Each thread waits inside the model until the other is there too, so that their forwards overlap for certain."""
    barrier = threading.Barrier(2, timeout=20)

    class Waits(nn.Conv1d):
        def forward(self, x):
            barrier.wait()
            return super().forward(x)

    model = nn.Sequential(Waits(1, 1, 1), Waits(1, 1, 1))
    both = tapped(model)
    results = {}

    def run(value):
        with torch.no_grad():
            results[value] = both(torch.full((1, 1, 4), value))[1]

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value, acts in results.items():
        assert list(acts) == ["0", "1"]
        weight, bias = model[0].weight.item(), model[0].bias.item()
        torch.testing.assert_close(acts["0"], torch.full((1, 1, 4), value * weight + bias))


def test_gradients_through_captured_tensors_are_those_of_cloning_hooks(x):
    model = InplaceReluTwice().train()

    def gradients(output, kept):
        model.zero_grad()
        (output.sum() + sum(value.pow(2).sum() for value in kept)).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    output, acts = tapped(model)(x)
    mine = gradients(output, acts.values())
    output, found = by_hand(model, x)
    for one, other in zip(mine, gradients(output, [value for _, value in found]), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("reduce", [None, lambda t: t.pow(2).mean(-1)])
def test_checkpointing_records_the_forward_only_and_its_recomputation_still_works(x, reduce):
    model = Checkpointed().train()
    output, acts = tapped(model, reduce=reduce)(x)
    assert list(acts) == ["first", "second#0", "second#1"]
    (output.sum() + sum(value.pow(2).sum() for value in acts.values())).backward()
    mine = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    output, found = by_hand(_Plain(model), x)
    kept = [value if reduce is None else reduce(value) for _, value in found]
    (output.sum() + sum(value.pow(2).sum() for value in kept)).backward()
    for one, parameter in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


class _Plain(nn.Module):
    """The checkpointed model without its checkpointing."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]  # in a list: no submodule, so that by_hand finds the names without a prefix

    def named_modules(self, *args, **kwargs):
        return self.model[0].named_modules(*args, **kwargs)

    def forward(self, x):
        return InplaceReluTwice.forward(self.model[0], x)


# -- the life of a tapped module


def _hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("at", ["output", "input"])
def test_close_and_with_take_the_hooks_off_and_a_closed_one_says_so(x, at):
    model = InplaceReluTwice()
    with tapped(model, at=at) as both:
        assert _hooks(model) == 4  # two layers, before and after
        both(x)
    assert _hooks(model) == 0
    both.close()
    for use in (lambda: both(x), both.__enter__):
        with pytest.raises(ConvtapError, match=r"this tapped model is closed. Make a new one with tapped\(model\)"):
            use()


def test_the_hooks_go_when_it_is_dropped_without_the_cycle_collector(x):
    model = InplaceReluTwice()
    both = tapped(model)
    both(x)
    gc.disable()
    try:
        del both
        assert _hooks(model) == 0
    finally:
        gc.enable()


def test_the_model_is_the_submodule_model_and_mode_and_state_follow_it():
    model = InplaceReluTwice().eval()
    both = tapped(model)
    assert both.model is model
    assert not both.training
    assert list(both.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    assert "2 layers: first, second" in repr(both)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_deep_copies_and_pickles_have_hooks_of_their_own(x, duplicate):
    both = tapped(InplaceReluTwice())
    other = duplicate(both)
    with torch.no_grad():
        other.model.first.weight.zero_()
    assert_same(both(x), both.model, x)
    assert_same(other(x), other.model, x)
    assert _hooks(other.model) == _hooks(both.model) == 4


def test_a_saved_file_gives_back_a_working_module(x):
    both = tapped(InplaceReluTwice(), "first")
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(x)[1]["first"], both(x)[1]["first"])


def test_a_shallow_copy_shares_the_model_and_closing_it_leaves_the_original(x):
    both = tapped(InplaceReluTwice())
    other = copy.copy(both)
    assert other.model is both.model
    assert_same(other(x), both.model, x)
    other.close()
    assert_same(both(x), both.model, x)


def test_a_copy_of_a_closed_one_is_closed(x):
    both = tapped(InplaceReluTwice())
    both.close()
    other = copy.deepcopy(both)
    assert _hooks(other.model) == 0
    with pytest.raises(ConvtapError, match="closed"):
        other(x)


def test_wrappers_leave_no_prefix_in_names(x):
    model = InplaceReluTwice()
    assert_same(tapped(nn.DataParallel(model))(x), model, x)
    assert [row.name for row in list_layers(tapped(model))] == ["first", "second"]
    both = tapped(model)
    with capture(both) as acts:
        both(x)
    assert list(acts) == ["first", "second#0", "second#1"]


# -- what is refused, and what is missing


def test_what_cannot_be_tapped_is_refused_with_what_to_write():
    model = InplaceReluTwice()
    with pytest.raises(Unsupported, match=r"Select the activations themselves: tapped\(model, types=nn.ReLU\)"):
        tapped(model, at="activation")
    with pytest.raises(InvalidValue, match=r"at='out' is invalid. Pass 'output' or 'input'"):
        tapped(model, at="out")
    with pytest.raises(InvalidType, match="reduce is a str"):
        tapped(model, reduce="mean")
    with pytest.raises(InvalidType, match="dtype='float16' is not a torch.dtype"):
        tapped(model, dtype="float16")
    with pytest.raises(InvalidType, match="must select layers"):
        tapped(model, torch.zeros(1))
    with pytest.raises(LayerNotFound, match=r"no Conv1d, .*1 Linear"):
        tapped(nn.Sequential(nn.Linear(2, 2)))
    assert _hooks(model) == 0


def test_data_parallel_on_several_devices_is_refused():
    model = nn.DataParallel(InplaceReluTwice())
    model.device_ids = [0, 1]
    with pytest.raises(Unsupported, match=r"on 2 devices.*tapped\(model.module\)"):
        tapped(model)


def test_a_scripted_model_is_refused(x):
    with pytest.raises(Unsupported, match="TorchScript runs no Python hooks"):
        tapped(torch.jit.trace(nn.Conv1d(2, 4, 3), x), types=nn.Module)


# -- convolutions that are called as functions


class Functional(nn.Module):
    """Kernels of all kinds, each used by a function call with in-place activations after it."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 2, 3))
        self.register_buffer("window", torch.randn(3, 1, 5))
        self.used = nn.Conv1d(3, 4, 3)
        self.masked = nn.Conv1d(4, 4, 3)
        self.both = nn.Conv1d(4, 4, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        self.up = nn.ConvTranspose1d(4, 4, 2, stride=2)

    def forward(self, x):
        x = F.conv1d(x, self.kernel).relu_()
        x = F.conv1d(input=x, weight=self.window, groups=3).relu_()
        x = torch.conv1d(x, self.used.weight, bias=self.used.bias).relu_()
        x = F.conv1d(x, self.masked.weight * 0.5).relu_()
        x = self.normed(self.both(x).relu_()).relu_()
        x = F.conv_transpose1d(self.up(x), self.up.weight)
        return F.conv1d(x, self.both.weight).relu_().sum(-1)

    def by_hand(self, x):
        a = F.conv1d(x, self.kernel)
        b = F.conv1d(a.relu(), self.window, groups=3)
        c = F.conv1d(b.relu(), self.used.weight, self.used.bias)
        d = F.conv1d(c.relu(), self.masked.weight * 0.5)
        e = F.conv1d(d.relu(), self.both.weight, self.both.bias)
        f = F.conv1d(e.relu(), self.normed.weight, self.normed.bias)
        up = F.conv_transpose1d(f.relu(), self.up.weight, self.up.bias, stride=2)
        g = F.conv1d(F.conv_transpose1d(up, self.up.weight), self.both.weight)
        found = {"kernel": a, "window": b, "used": c, "F.conv1d": d, "both#0": e, "normed": f, "both#1": g}
        return g.relu().sum(-1), found


def _in_export(model, x, strict):
    return torch.export.export(model, (x,), strict=strict).module()(x)


RUNS = {
    "eager": lambda both, x: both(x),
    "compiled": lambda both, x: torch.compile(both, backend="eager", fullgraph=True)(x),
    "inductor": lambda both, x: torch.compile(both, fullgraph=True)(x),
    "exported": lambda both, x: _in_export(both, x, False),
    "exported strictly": lambda both, x: _in_export(both, x, True),
}


@pytest.mark.filterwarnings("ignore:.*side effect.*:UserWarning", "ignore:.*masked.*:convtap.CoverageWarning")
@pytest.mark.parametrize("run", RUNS)
def test_convolutions_called_as_functions_come_out_under_the_names_of_their_kernels(x, run):
    model = Functional().eval()
    both = tapped(model)
    with torch.no_grad():
        y, expected = model.by_hand(x)
        both(x)  # 'masked' itself is idle, and the compiler is told by this
        found, acts = RUNS[run](both, x)
        plain = model(x)
    assert list(acts) == list(expected)
    torch.testing.assert_close(acts, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, y, atol=1e-4, rtol=1e-4)
    assert run != "eager" or torch.equal(found, plain)
    with capture(model) as seen:
        model(x)
    assert list(seen) == list(acts)


def test_inputs_and_gradients_of_functions_come_out_too(x):
    model = Functional().eval()
    _, acts = tapped(model, ["kernel", "used", "F.conv1d"], at="input")(x)
    _, expected = model.by_hand(x)
    assert list(acts) == ["kernel", "used", "F.conv1d"]
    torch.testing.assert_close(acts["used"], expected["window"].relu())
    torch.testing.assert_close(acts["F.conv1d"], expected["used"].relu())
    _, acts = tapped(model, ["window", "used"], reduce=lambda t: t.mean(-1))(x)
    acts["used"].sum().backward()
    gradient, model.kernel.grad = model.kernel.grad, None
    expected["used"].mean(-1).sum().backward()
    torch.testing.assert_close(gradient, model.kernel.grad)


def test_only_selected_kernels_come_out(x):
    model = Functional().eval()
    for layers, names in (
        ("kernel", ["kernel"]),
        (["w*", "used"], ["window", "used"]),
        ("F.conv1d", ["F.conv1d"]),
        (["used", "normed"], ["used", "normed"]),
    ):
        assert list(tapped(model, layers)(x)[1]) == names
    assert list(tapped(model, types=nn.ConvTranspose1d)(x)[1]) == ["up"]
    with pytest.raises(LayerNotFound, match=r"no layer is named 'kernal'.*Did you mean 'kernel'"):
        tapped(model, "kernal")


def test_a_layers_own_convolution_is_no_second_one(x):
    class Trims(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)[..., :-1] * 2

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
            self.b.weight = self.a.weight
            self.trims = Trims(2, 2, 3)
            self.inner = nn.Sequential(nn.Conv1d(2, 2, 1))

        def forward(self, x):
            return self.inner(self.trims(self.b(self.a(x))))

    model = Tied()
    for layers, names in (
        (None, ["a", "b", "trims", "inner.0"]),
        (["a", "trims", "inner", "inner.0"], ["a", "trims", "inner.0", "inner"]),
    ):
        _, acts = tapped(model, layers)(x)
        assert list(acts) == names
        assert torch.equal(acts["trims"], model.trims(model.b(model.a(x))))
    with pytest.raises(NotCaptured, match="recorded no output of 1 of .*: F.conv1d"):
        tapped(model, [*layers, "F.conv1d"])(x)  # no convolution ran outside of a layer


def test_a_convolution_that_raised_inside_the_model_does_not_hide_the_next(x):
    class Retries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right, self.last = nn.Conv1d(9, 2, 3), nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 1)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                x = self.right(x)
                return F.conv1d(x, self.last.weight * 2)

    with pytest.warns(convtap.CoverageWarning, match="wrong, last"):
        _, acts = tapped(Retries())(x)
    assert list(acts) == ["right", "F.conv1d"]


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_the_fast_path_of_a_transformer_stays_on():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 8, 3, padding=1)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x, padding):
            return self.encoder(self.conv(x).transpose(1, 2), src_key_padding_mask=padding)

    model = Model().eval()
    x, padding = torch.randn(2, 1, 10), torch.arange(10).expand(2, 10) > torch.tensor([[9], [5]])
    with torch.no_grad():
        y, acts = tapped(model)(x, padding)
        assert torch.equal(y, model(x, padding))
    assert list(acts) == ["conv"]


# -- layers that are idle


class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.spare = nn.Conv1d(2, 4, 3), nn.Conv1d(2, 4, 3)

    def forward(self, x):
        return self.conv(x)


SPARE = r"the result lacks 1 selected layer that did not run in this forward pass: spare\."


def test_an_idle_layer_is_left_out_and_said_unless_it_was_asked_for_by_name(x):
    model = Spare()
    for layers in (None, "*", lambda name, module: True):
        with pytest.warns(convtap.CoverageWarning, match=SPARE) as caught:
            _, acts = tapped(model, layers)(x)
        assert list(acts) == ["conv"]
        assert caught[0].filename == __file__
    for layers in ("spare", ["conv", "spare"], model.spare, ["*", "spare"]):
        with pytest.raises(
            NotCaptured, match=r"1 of \d selected layers?: spare\. If such a layer is idle, remove it from layers="
        ):
            tapped(model, layers)(x)
    with pytest.raises(NotCaptured, match="recorded no output of 1 of 1 selected layer: spare"):
        tapped(model, lambda name, module: name == "spare")(x)


def test_an_idle_layer_is_left_out_of_exports(x):
    with pytest.warns(convtap.CoverageWarning, match=SPARE):
        program = torch.export.export(tapped(Spare().eval()), (x,), strict=False)
    assert list(program.module()(x)[1]) == ["conv"]


def test_a_compiled_forward_leaves_out_what_was_idle_before_it_was_compiled(x):
    both = tapped(Spare())
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="NotCaptured: .*recorded no output of 1 of 2 selected layers: spare"):
        compiled(x)
    torch._dynamo.reset()
    with pytest.warns(convtap.CoverageWarning, match=SPARE):
        both(x)
        _, acts = compiled(x)
    assert list(acts) == ["conv"]


# -- torch.compile


def _compile_others(kind, backend, x):
    """Compiles other instances of the class first: their code is what Dynamo would take by mistake."""
    with torch.no_grad():
        if kind == "plain":
            torch.compile(InplaceReluTwice(), backend=backend, fullgraph=True)(x)
        if kind == "tapped":
            for layers in ("first", "second"):
                torch.compile(tapped(InplaceReluTwice(), layers), backend=backend, fullgraph=True)(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("others", [None, "plain", "tapped"])
def test_compiled_in_one_graph_it_is_right_whatever_was_compiled_before(x, backend, others):
    _compile_others(others, backend, x)
    model = InplaceReluTwice()
    compiled = torch.compile(tapped(model), backend=backend, fullgraph=True)
    with torch.no_grad():
        for shape in [(2, 2, 16), (3, 2, 20), (1, 2, 33)]:
            given = torch.randn(shape)
            assert_same(compiled(given), model, given)


def test_inductor_trains_through_captured_tensors_with_changing_shapes(x):
    """One compilation for all of it, forward and backward, since each takes seconds."""
    torch.compile(InplaceReluTwice(), backend="eager", fullgraph=True)(x)
    model = InplaceReluTwice().train()
    compiled = torch.compile(tapped(model), fullgraph=True, dynamic=True)
    for length in (16, 21):
        given = torch.randn(2, 2, length)
        result = compiled(given)
        assert_same(result, model, given, atol=1e-5)
        (result[0].sum() + sum(value.pow(2).sum() for value in result[1].values())).backward()
        mine = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        output, found = by_hand(model, given)
        (output.sum() + sum(value.pow(2).sum() for _, value in found)).backward()
        for one, parameter in zip(mine, model.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad, atol=1e-4, rtol=1e-4)
        model.zero_grad()


def test_reduce_dtype_and_inputs_are_compiled_too(x):
    model = InplaceReluTwice()
    with torch.no_grad():
        both = tapped(model, "first", at="input", reduce=lambda t: t[:, :1].mean(-1), dtype=torch.float64)
        _, acts = torch.compile(both, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(acts["first"], x[:, :1].mean(-1).double(), atol=0, rtol=0)


def test_a_layer_that_returns_a_tuple_is_compiled_with_its_structure(x):
    model = nn.Sequential(PairConv(2, 4, 3))
    _, acts = torch.compile(tapped(model), backend="aot_eager", fullgraph=True)(x)
    expected, mask = model(x)
    assert torch.equal(acts["0"][0], expected)
    assert torch.equal(acts["0"][1], mask)


class Outer(nn.Module):
    """Has a tapped model as a part, so that all instances share the code of this forward."""

    def __init__(self, layers):
        super().__init__()
        self.part = tapped(InplaceReluTwice(), layers)

    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager", fullgraph=True), None])
def test_as_a_part_of_compiled_models_of_one_class_each_gives_its_own_layers(x, wrap):
    for layers, keys in [
        ("first", ["first"]),
        (None, ["first", "second#0", "second#1"]),
        ("second", ["second#0", "second#1"]),
    ]:
        model = Outer(layers)
        if wrap is None:
            model.part.compile(backend="eager", fullgraph=True)
        compiled = model if wrap is None else wrap(model)
        assert list(compiled(x)[1]) == keys


def test_other_threads_get_the_results_of_a_compiled_one_too(x):
    model = InplaceReluTwice()
    compiled = torch.compile(tapped(model), backend="eager", fullgraph=True)
    results = []

    def run():
        with torch.no_grad():
            results.append(compiled(x))

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for result in results:
        assert_same(result, model, x)


def test_a_warm_one_needs_no_recompilation(x):
    """A frame of ours that Dynamo had to look at in every call would count as a recompilation."""
    model = InplaceReluTwice()
    with torch.no_grad():
        compiled = torch.compile(tapped(model), backend="eager", fullgraph=True)
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(compiled(x), model, x)


def test_any_number_of_instances_is_compiled_with_code_of_their_own():
    """Dynamo keeps at most eight compilations for a code object, and with fullgraph=True a ninth is an error."""
    model = nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(9)))
    x = torch.randn(1, 1, 4)
    with torch.no_grad():
        for name in map(str, range(9)):
            _, acts = torch.compile(tapped(copy.deepcopy(model), name), backend="eager", fullgraph=True)(x)
            assert list(acts) == [name]


def test_parametrized_convolutions_and_autocast_are_compiled_too(x):
    model = InplaceReluTwice()
    model.second = torch.nn.utils.parametrizations.weight_norm(model.second)
    compiled = torch.compile(tapped(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), model, x)
        with torch.autocast("cpu", torch.bfloat16):
            result = compiled(x)
            assert result[1]["first"].dtype == torch.bfloat16
            assert_same(result, model, x)


def test_functional_call_uses_the_parameters_it_is_given(x):
    model = InplaceReluTwice()
    zeros = {f"model.{key}": torch.zeros_like(value) for key, value in model.named_parameters()}
    _, acts = torch.func.functional_call(tapped(model), zeros, (x,))
    assert list(acts) == ["first", "second#0", "second#1"]
    assert not acts["first"].any()


def test_vmap_gives_the_whole_batch_without_wrappers():
    model = InplaceReluTwice()
    x = torch.randn(3, 2, 2, 16)
    with torch.no_grad():
        _, acts = torch.func.vmap(tapped(model))(x)
        expected = torch.stack([by_hand(model, part)[1][0][1] for part in x])
    assert not torch._C._functorch.is_batchedtensor(acts["first"])
    torch.testing.assert_close(acts["first"], expected)


def test_with_a_graph_break_it_is_right_or_an_error_never_without_a_layer(x):
    model = BreaksTheGraph()
    with torch.no_grad():
        for others in (None, ["f*"], "second"):
            torch._dynamo.reset()
            if others is not None:  # what follows the break is compiled for the class, with other hooks
                torch.compile(tapped(BreaksTheGraph(), others), backend="eager")(x)
            _, acts = torch.compile(tapped(model), backend="eager")(x)
            assert torch.equal(acts["first"], model.first(x))
            assert torch.equal(acts["second"], model.second(model.first(x).relu()))


def test_with_a_graph_break_other_layers_are_an_error_if_they_do_not_come_out(x):
    class Ends(BreaksTheGraph):
        def __init__(self):
            super().__init__()
            self.end = nn.Tanh()

        def forward(self, x):
            return self.end(super().forward(x))

    with torch.no_grad():
        torch.compile(tapped(Ends(), nn.ReLU), backend="eager")(x)
        with pytest.raises(
            Exception, match=r"NotCaptured: .*compiled by itself before.*torch.compile\(tapped\(model\)"
        ):
            torch.compile(tapped(Ends(), types=(nn.ReLU, nn.Tanh)), backend="eager")(x)


def test_a_part_that_was_compiled_before_is_right_or_an_error_in_eager_and_right_when_compiled_as_a_whole(x):
    part = InplaceReluTwice()
    model = nn.Sequential(nn.Conv1d(2, 2, 1), torch.compile(part, backend="eager"))
    names = ["0", "1.first", "1.second#0", "1.second#1"]
    with torch.no_grad():
        model(x)
        both = tapped(model)
        for run in (both, torch.compile(both, backend="eager", fullgraph=True)):
            _, acts = run(x)
            assert list(acts) == names
            assert torch.equal(acts["1.first"], part.first(model[0](x)))
        with pytest.raises(NotCaptured, match=r"recorded no output of .*: 1.relu\..*compile the whole"):
            tapped(model, types=nn.ReLU)(x)


def test_a_copy_of_the_inner_model_compiles_in_one_graph(x):
    model = tapped(InplaceReluTwice()).model
    plain = copy.deepcopy(model)
    assert torch.equal(torch.compile(plain, backend="eager", fullgraph=True)(x), model(x))


def test_closing_it_ends_the_compiled_one_too(x):
    both = tapped(InplaceReluTwice())
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    compiled(x)
    both.close()
    with pytest.raises(Exception, match="ConvtapError: this tapped model is closed"):
        compiled(x)


def test_a_compiled_one_is_freed_and_its_hooks_go(x):
    model = InplaceReluTwice()
    both = tapped(model)
    torch.compile(both, backend="eager", fullgraph=True)(x)
    freed = weakref.ref(both)
    del both
    gc.collect()
    assert freed() is None
    assert _hooks(model) == 0


# -- export


def test_an_exported_program_gives_the_layers_for_other_lengths(x):
    model = InplaceReluTwice().eval()
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(tapped(model), (x,), dynamic_shapes={"x": {2: length}})
    given = torch.randn(2, 2, 23)
    with torch.no_grad():
        assert_same(program.module()(given), model, given)
    assert set(program.state_dict) == {f"model.{key}" for key in model.state_dict()}


def test_export_of_a_model_with_a_layer_that_does_not_come_out_is_an_error(x):
    both = tapped(Spare().eval(), ["conv", "spare"])
    with pytest.raises(NotCaptured, match="recorded no output of 1 of 2 selected layers: spare"):
        torch.export.export(both, (x,), strict=False)


def test_one_onnx_file_has_the_layers_as_named_outputs(x, tmp_path):
    import onnxruntime  # takes a while, and only this test needs it

    model = InplaceReluTwice().eval()
    both = tapped(model)
    names = ["y", *both(x)[1]]
    file = tmp_path / "model.onnx"
    dynamic = {"x": {2: torch.export.Dim("length", min=4, max=64)}}
    torch.onnx.export(both, (x,), file, dynamo=True, output_names=names, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["x"]
    assert [output.name for output in session.get_outputs()] == ["y", "first", "second#0", "second#1"]
    given = torch.randn(2, 2, 29)
    with torch.no_grad():
        output, found = by_hand(model, given)
    for mine, expected in zip(
        session.run(None, {"x": given.numpy()}), [output, *numbered(found).values()], strict=True
    ):
        np.testing.assert_allclose(mine, expected.numpy(), atol=1e-5)
