"""A captured value is the one the layer returned, whatever is written afterwards; and gradients flow through it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import ModifiedInPlace, capture
from convtap._tensors.snapshot import snapshot
from tests.models import AfterConv, FiveConvs, FunctionalConvs, StructuredOutputs
from tests.process import run_python
from tests.reference import cloning_hooks, patched_conv1d, same


def add_inplace(y):
    y.add_(3)
    return y


def write_through_a_view_made_before(y):
    view = y[:, 1:, ::2]
    view.mul_(-2)
    return y


def write_through_a_transposed_view(y):
    y.transpose(1, 2)[:, 0].fill_(7)
    return y


def write_by_index(y):
    y[..., 2:5] = 0
    return y


def write_with_out(y):
    torch.exp(y.detach(), out=y.detach())
    return y * 1


WRITES = {
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
    "F.relu_": F.relu_,
    "add_": add_inplace,
    "view": write_through_a_view_made_before,
    "transposed view": write_through_a_transposed_view,
    "index": write_by_index,
    "out=": write_with_out,
    "dropout": nn.Dropout(0.5, inplace=True),
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_the_value_survives(write, mode, dtype):
    model, x = AfterConv(WRITES[write]).to(dtype), torch.randn(2, 2, 16, dtype=dtype)
    with MODES[mode](), cloning_hooks(model) as expected:
        torch.manual_seed(1)
        plain = model(x)
    for options in ({}, {"detach": False}, {"offload": "cpu"}):
        with MODES[mode](), capture(model, **options) as acts:
            torch.manual_seed(1)
            y = model(x)
        assert same(acts["conv"], expected[0][1]), options
        assert same(y, plain), options
        assert not same(acts["conv"], y) or write == "dropout"


@pytest.mark.parametrize("mode", MODES)
def test_views_made_by_the_layer_before_the_hook_write_through_as_well(mode):
    class KeepsAView(nn.Conv1d):
        def forward(self, x):
            y = super().forward(x)
            self.view = y.detach()[:, :1]
            return y

    model = nn.Sequential(KeepsAView(1, 3, 3))
    with MODES[mode](), capture(model) as acts:
        y = model(torch.randn(2, 1, 9))
        before = y.clone()
        model[0].view.fill_(5)
    assert torch.equal(acts["0"], before)
    assert not torch.equal(y, before)


def test_what_is_kept_can_be_written_without_touching_the_model():
    model, x = AfterConv(lambda y: y), torch.randn(1, 2, 9)
    with torch.no_grad(), capture(model) as acts:
        y = model(x)
    before = y.clone()
    acts["conv"].zero_()
    acts.numpy()["conv"][:] = 3
    assert torch.equal(y, before)


def test_the_snapshot_shares_memory_until_something_is_written():
    x = torch.randn(1000)
    kept = snapshot(x)
    assert torch._C._data_address(kept) == torch._C._data_address(x)
    x.add_(1)
    assert torch._C._data_address(kept) != torch._C._data_address(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own, at creation
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 4).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.from_numpy(torch.arange(4.0).numpy()),
        lambda: nn.Parameter(torch.ones(3)),
        lambda: torch.randn(4, dtype=torch.complex64).conj(),
        lambda: torch.randn(3, 4).t(),
        lambda: torch.ones(0, 3),
        lambda: torch.randn(2, 3).to_mkldnn(),
    ],
    ids=["sparse", "nested", "numpy", "parameter", "conj", "transposed", "empty", "mkldnn"],
)
def test_tensors_outside_the_allow_list_are_kept_as_well(make):
    tensor = make()
    kept = snapshot(tensor)
    assert type(kept) is type(tensor) or isinstance(tensor, nn.Parameter)

    def dense(t):
        return t.to_padded_tensor(0) if t.is_nested else t if t.layout is torch.strided else t.to_dense()

    assert torch.equal(dense(kept), dense(tensor))


def test_an_output_in_a_layout_without_copy_on_write_survives_what_is_written_after_it():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv1d(3, 1, 1)).eval()
    cloned = []
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda m, a, output: cloned.append(output.to_dense().clone()))
    with torch.no_grad(), capture(model) as acts:
        model(torch.randn(2, 2, 8).to_mkldnn())
    assert [value.layout for value in acts.values()] == [torch._mkldnn, torch._mkldnn]
    assert all(torch.equal(value.to_dense(), clone) for value, clone in zip(acts.values(), cloned, strict=True))


def test_a_quantized_output_does_not_crash_the_process():
    script = """
import torch, warnings
warnings.simplefilter("ignore")
from torch import nn
import torch.ao.nn.quantized as nnq
from convtap import capture
model = nn.Sequential(nnq.Quantize(0.1, 0, torch.quint8), nnq.Conv1d(1, 2, 3), nnq.ReLU6(inplace=True))
x = torch.randn(2, 1, 20)
seen = []
handle = model[1].register_forward_hook(lambda m, a, o: seen.append(o.dequantize().clone()))
model(x)
handle.remove()
for _ in range(20):
    with capture(model) as acts:
        y = model(x)
    assert acts["1"].is_quantized
    assert torch.equal(acts["1"].dequantize(), seen[0])
del acts, y
print(sum(torch.randn(1000).sum().item() for _ in range(100)) == 0, "alive")
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout


def test_a_plain_convolution_whose_output_was_quantized_on_the_way_does_not_crash_the_process():
    script = """
import torch, warnings
warnings.simplefilter("ignore")
from torch import nn
from convtap import capture
def quantized(output):
    return torch.quantize_per_tensor(output.detach(), 0.1, 0, torch.quint8)
class Inside(nn.Conv1d):
    def _conv_forward(self, *args):
        return quantized(super()._conv_forward(*args))
hooked, patched = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3)
hooked.register_forward_hook(lambda m, a, output: quantized(output))
forward = patched.forward
patched.forward = lambda x: quantized(forward(x))
x = torch.randn(2, 1, 20)
for layer in (hooked, patched, Inside(1, 2, 3)):
    right = layer(x).dequantize()
    with capture(nn.Sequential(layer)) as acts:
        layer(x)
    assert torch.equal(acts["0"].dequantize(), right)
    del acts
print(sum(torch.randn(1000).sum().item() for _ in range(100)) == 0, "alive")
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout


# -- copy=False


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("write", [name for name in WRITES if name not in ("dropout", "out=")])
def test_an_alias_that_was_written_refuses_to_be_read(write, detach):
    model = AfterConv(WRITES[write])
    with capture(model, copy=False, detach=detach) as acts:
        model(torch.randn(2, 2, 16))
    with pytest.raises(ModifiedInPlace, match=r"'conv' was kept as an alias.*changed it in place.*copy=True"):
        acts["conv"]
    assert "conv" in repr(acts)


def test_an_alias_that_was_not_written_is_the_layers_own_memory():
    model, x = AfterConv(lambda y: y * 2), torch.randn(2, 2, 16)
    pointers = []
    model.conv.register_forward_hook(lambda m, a, y: pointers.append(y.data_ptr()))
    with capture(model, copy=False) as acts:
        model(x)
    assert acts["conv"].data_ptr() == pointers[0]


def test_in_inference_mode_an_alias_becomes_a_snapshot_since_nothing_counts_its_writes():
    model, x = AfterConv(F.relu_), torch.randn(2, 2, 16)
    with torch.inference_mode(), cloning_hooks(model) as expected:
        model(x)
    with torch.inference_mode(), capture(model, copy=False) as acts:
        model(x)
    assert same(acts["conv"], expected[0][1])


# -- detach=False


def by_hand(model: AfterConv, x, then):
    """The model rewritten to return its layer's output, cloned before the in-place operation."""
    hidden = model.conv(x)
    return hidden, then(hidden.clone())


@pytest.mark.parametrize("write", [name for name in WRITES if name not in ("dropout", "out=")])
def test_gradients_flow_through_the_captured_output(write):
    model, x = AfterConv(WRITES[write]), torch.randn(2, 2, 16)
    weights = torch.randn(2, 4, 16)
    hidden, out = by_hand(model, x, WRITES[write])
    expected = torch.autograd.grad((out * weights).sum(), [hidden, model.conv.weight])
    with capture(model, detach=False) as acts:
        loss = (model(x) * weights).sum()
    got = torch.autograd.grad(loss, [acts["conv"], model.conv.weight])
    assert same(got, expected)


def test_gradients_of_several_layers_and_calls():
    model, x = FiveConvs(inplace=True), torch.randn(2, 1, 30)
    hidden, y = [], x
    for conv in model.convs:
        hidden.append(conv(y))
        y = hidden[-1].clone().relu()
    expected = torch.autograd.grad(y.pow(2).sum(), hidden)
    with capture(model, detach=False) as acts:
        loss = model(x).pow(2).sum()
    assert same(torch.autograd.grad(loss, list(acts.values())), expected)


def test_gradients_flow_through_functional_convolutions():
    model, x = FunctionalConvs(), torch.randn(2, 1, 12)
    with capture(model, detach=False) as acts:
        loss = model(x).sum()
    with patched_conv1d() as seen:
        model(x)
    assert same([output.detach() for output in acts.values()][:-1], seen)
    for gradient in torch.autograd.grad(loss, list(acts.values())):
        assert gradient.abs().sum() > 0


def test_structures_are_swapped_whole_and_stay_upstream_of_the_loss():
    model, x = StructuredOutputs(), torch.randn(2, 1, 12)
    with cloning_hooks(model) as expected:
        plain = model(x)
    with capture(model, detach=False) as acts:
        y = model(x)
    assert torch.equal(y, plain)
    assert same(acts["t"], expected[0][1])
    hidden = [nn.Conv1d.forward(model.t, x)]
    hidden.append(nn.Conv1d.forward(model.d, hidden[0].relu()))
    hidden.append(nn.Conv1d.forward(model.p, hidden[1].relu()))
    by_hand = torch.autograd.grad(hidden[2].relu().sum(), hidden)
    assert same(torch.autograd.grad(y.sum(), [acts["t"][0], acts["d"]["y"], acts["p"].hidden]), by_hand)


def test_a_higher_derivative_goes_through_the_captured_output():
    model, x = AfterConv(lambda y: y.pow(3)), torch.randn(1, 2, 8, requires_grad=True)
    hidden = model.conv(x)
    (first,) = torch.autograd.grad(hidden.pow(3).sum(), hidden, create_graph=True)
    expected = torch.autograd.grad(first.pow(2).sum(), x)[0]
    with capture(model, detach=False) as acts:
        loss = model(x).sum()
    (first,) = torch.autograd.grad(loss, acts["conv"], create_graph=True)
    assert same(torch.autograd.grad(first.pow(2).sum(), x)[0], expected)


def test_an_output_that_is_its_input_is_kept_as_an_alias_and_watched():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Identity(), nn.ReLU(inplace=True))
    with capture(model, "1", detach=False) as acts:
        y = model(torch.randn(1, 1, 9))
    assert (y >= 0).all()
    with pytest.raises(ModifiedInPlace):
        acts["1"]


def test_with_reduce_the_weights_still_get_gradients():
    model, x = FiveConvs(inplace=True), torch.randn(2, 1, 30)
    expected = torch.autograd.grad(model.convs[0](x).mean(-1).double().sum(), model.convs[0].weight)
    with capture(model, "convs.0", detach=False, reduce=lambda t: t.mean(-1), dtype=torch.float64) as acts:
        model(x)
    assert acts["convs.0"].dtype is torch.float64
    torch.testing.assert_close(torch.autograd.grad(acts["convs.0"].sum(), model.convs[0].weight), expected)


def test_detached_outputs_keep_no_graph():
    model = FiveConvs()
    with capture(model) as acts:
        model(torch.randn(1, 1, 20))
    assert not any(output.requires_grad for output in acts.values())


# -- reduce and dtype


def test_reduce_and_dtype_apply_in_this_order():
    model, x = FiveConvs(inplace=True), torch.randn(2, 1, 30)
    with cloning_hooks(model) as expected:
        model(x)
    with capture(model, reduce=lambda t: t.amax(-1), dtype=torch.float16) as acts:
        model(x)
    assert same(list(acts.values()), [output.amax(-1).to(torch.float16) for _, output in expected])


def test_a_reduce_that_writes_in_place_changes_nothing_in_the_model():
    model, x = AfterConv(lambda y: y), torch.randn(2, 2, 16)
    plain = model(x)
    with capture(model, reduce=lambda t: t.zero_()) as acts:
        y = model(x)
    assert torch.equal(y, plain)
    assert acts["conv"].abs().sum() == 0


def test_a_slice_keeps_only_its_own_bytes():
    model, x = AfterConv(lambda y: y, channels=64), torch.randn(4, 2, 100)
    with capture(model, reduce=lambda t: t[:, :2, ::10]) as acts:
        y = model(x)
    assert torch.equal(acts["conv"], y[:, :2, ::10])
    assert acts["conv"].untyped_storage().nbytes() == 4 * 2 * 10 * 4
    assert acts.nbytes == 4 * 2 * 10 * 4


def test_a_reduce_that_returns_one_buffer_again_and_again_does_not_overwrite():
    model, x = FiveConvs(), torch.randn(1, 1, 20)
    buffer = torch.zeros(1)
    with cloning_hooks(model) as expected:
        model(x)
    with capture(model, reduce=lambda t: buffer.copy_(t.sum().detach())) as acts:
        model(x)
    assert same(list(acts.values()), [output.sum().reshape(1) for _, output in expected])


def test_convolutions_inside_reduce_are_not_the_models():
    model, x = FiveConvs(), torch.randn(1, 1, 20)
    with capture(model, "convs.0", reduce=lambda t: F.conv1d(t, torch.ones(1, 4, 1))) as acts:
        model(x)
    assert list(acts) == ["convs.0"]


def test_two_blocks_that_keep_the_graph_both_survive_what_the_model_writes():
    model, x = nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU(inplace=True)), torch.randn(1, 2, 6)
    expected = nn.Conv1d.forward(model[0], x)
    with capture(model, detach=False) as outer, capture(model, detach=False, grads=True) as inner:
        loss = model(x).sum()
    assert torch.equal(outer["0"], expected)
    assert torch.equal(inner["0"], expected)
    gradients = torch.autograd.grad(loss, [outer["0"], inner["0"]])
    assert all(torch.equal(g, (expected > 0).float()) for g in gradients)
