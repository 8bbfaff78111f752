"""``grads=True``: every expected gradient is one that torch gives without convtap (autograd.grad on a plain re-computation)."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from convtap._capture.capture import capture
from convtap._errors import InvalidValue, MemoryLimitExceeded, NotCaptured, Unsupported


def by_hand(outputs, loss):
    """d(loss)/d(output) of tensors that are on the path to a loss, by autograd itself."""
    return torch.autograd.grad(loss, outputs, retain_graph=True)


class Inplace(nn.Module):
    """An in-place activation right after each convolution."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(1, 3, 3, padding=1)
        self.two = nn.Conv1d(3, 2, 3, padding=1)

    def forward(self, x):
        return F.relu_(self.two(F.relu_(self.one(x)))).mul(2)

    def reference(self, x):
        """The same without anything in place: the gradients at both outputs."""
        one = self.one(x)
        two = self.two(one.relu())
        return by_hand([one, two], ((two.relu() * 2) ** 2).sum())


class Repeated(nn.Module):
    """One convolution, three times in a row; each run may be in a checkpoint of its own, or all in one."""

    def __init__(self, mode="plain"):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.mode = mode

    def step(self, x):
        return F.relu_(self.conv(x)) + x

    def all(self, x):
        return self.step(self.step(self.step(x)))

    def forward(self, x):
        if self.mode == "plain":
            return self.all(x)
        reentrant = "reentrant" in self.mode
        if "one" in self.mode:
            return checkpoint(self.all, x, use_reentrant=reentrant)
        for _ in range(3):
            x = checkpoint(self.step, x, use_reentrant=reentrant)
        return x

    def reference(self, x):
        outputs = []
        for _ in range(3):
            outputs.append(self.conv(x))
            x = outputs[-1].relu() + x
        return by_hand(outputs, (x**2).sum())


def loss_of(y):
    return (y**2).sum()


def test_grad_is_right_before_an_inplace_activation():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, grads=True) as acts:
        y = model(x)
    assert [call.grad for call in acts.calls()] == [None, None]
    loss_of(y).backward()
    for call, expected in zip(acts.calls(), model.reference(x), strict=True):
        torch.testing.assert_close(call.grad, expected)
        assert call.grad.shape == call.output.shape
        assert not call.grad.requires_grad


@pytest.mark.parametrize("mode", ["plain", "one", "each", "one reentrant", "each reentrant"])
def test_each_call_of_a_repeated_layer_has_its_own_grad(mode):
    model, x = Repeated(mode), torch.randn(2, 2, 9, requires_grad=True)
    with capture(model, grads=True) as acts:
        loss_of(model(x)).backward()
    expected = model.reference(x)
    assert [call.key for call in acts.calls()] == ["conv#0", "conv#1", "conv#2"]
    for call, gradient in zip(acts.calls(), expected, strict=True):
        torch.testing.assert_close(call.grad, gradient)


@pytest.mark.parametrize("mode", ["one reentrant", "each reentrant"])
def test_a_second_backward_pass_through_reentrant_checkpoints_is_matched_anew(mode):
    model, x = Repeated(mode), torch.randn(2, 2, 9, requires_grad=True)
    with capture(model, grads=True) as acts:
        y = model(x)
        loss_of(y).backward(retain_graph=True)
        (3 * loss_of(y)).backward()
    for call, gradient in zip(acts.calls(), model.reference(x), strict=True):
        torch.testing.assert_close(call.grad, 3 * gradient)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner ones first run without a graph
def test_nested_reentrant_checkpoints():
    model, x = Repeated("each reentrant"), torch.randn(2, 2, 9, requires_grad=True)
    with capture(model, grads=True) as acts:
        loss_of(checkpoint(model, x, use_reentrant=True)).backward()
    for call, gradient in zip(acts.calls(), model.reference(x), strict=True):
        torch.testing.assert_close(call.grad, gradient)


def test_a_reentrant_checkpoint_whose_backward_ran_after_the_block_is_told():
    model, x = Repeated("one reentrant"), torch.randn(2, 2, 9, requires_grad=True)
    with capture(model, grads=True) as acts:
        y = model(x)
    loss_of(y).backward()
    with pytest.raises(NotCaptured, match=r"'conv#0'.*use_reentrant=True.*loss.backward\(\) inside the capture"):
        _ = acts.calls()[0].grad


def test_function_taps_have_grads():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 1, 3))

        def forward(self, x):
            return F.relu_(F.conv1d(x, self.weight))

    model, x = Functional(), torch.randn(1, 1, 8)
    with capture(model, grads=True) as acts:
        y = model(x)
    loss_of(y).backward()
    assert acts.calls()[0].via == "function"
    out = F.conv1d(x, model.weight)
    torch.testing.assert_close(acts.calls()[0].grad, by_hand([out], loss_of(out.relu()))[0])


def test_autograd_grad_brings_gradients_too():
    model, x = Inplace(), torch.randn(2, 1, 9, requires_grad=True)
    with capture(model, grads=True) as acts:
        torch.autograd.grad(loss_of(model(x)), [x])
    for call, expected in zip(acts.calls(), model.reference(x), strict=True):
        torch.testing.assert_close(call.grad, expected)


def test_a_layer_that_autograd_grad_does_not_reach_has_none():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, grads=True) as acts:
        torch.autograd.grad(loss_of(model(x)), [model.two.weight])
    one, two = acts.calls()
    assert one.grad is None
    torch.testing.assert_close(two.grad, model.reference(x)[1])


def test_with_detach_false_the_output_is_upstream_and_has_a_grad():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, detach=False, grads=True) as acts:
        y = model(x)
    got = torch.autograd.grad(loss_of(y), [acts["one"], acts["two"]])
    for call, gradient, expected in zip(acts.calls(), got, model.reference(x), strict=True):
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(call.grad, expected)


def test_an_unbatched_output_is_a_view_and_still_has_its_grad():
    model, x = Inplace(), torch.randn(1, 9)
    assert model.one(x)._is_view()
    with capture(model, grads=True) as acts:
        y = model(x)
    loss_of(y).backward()
    for call, expected in zip(acts.calls(), model.reference(x), strict=True):
        torch.testing.assert_close(call.grad, expected)


def test_the_model_computes_the_same_with_grads():
    model, x = Inplace(), torch.randn(1, 9)
    plain = model(x)
    plain.sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with capture(model, grads=True):
        y = model(x)
    y.sum().backward()
    assert torch.equal(y, plain)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_tuple_output_has_a_tuple_of_grads():
    class Pair(nn.Conv1d):
        def forward(self, x):
            out = super().forward(x)
            return out, torch.ones(3), out * 2

    model, x = Pair(1, 2, 3), torch.randn(1, 1, 8)
    with capture(model, grads=True) as acts:
        first, _, third = model(x)
    (first.sum() + 5 * third.sum()).backward()
    grad = acts.calls()[0].grad
    assert grad[1] is None
    assert torch.equal(grad[0], torch.full((1, 2, 6), 11.0))  # once itself, and through the third: 2 * 5
    assert torch.equal(grad[2], torch.full((1, 2, 6), 5.0))


def test_the_last_backward_pass_counts():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, "two", grads=True) as acts:
        y = model(x)
    y.sum().backward(retain_graph=True)
    loss_of(y).backward()
    torch.testing.assert_close(acts.calls()[0].grad, model.reference(x)[1])


def test_grads_follow_dtype():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, dtype=torch.bfloat16, grads=True) as acts:
        loss_of(model(x)).backward()
    for call, expected in zip(acts.calls(), model.reference(x), strict=True):
        assert torch.equal(call.grad, expected.to(torch.bfloat16))


def test_a_complex_gradient_is_cast_to_complex_types_and_to_no_others():
    model = nn.Sequential(nn.Conv1d(1, 2, 3, dtype=torch.complex64))
    x = torch.randn(1, 1, 20, dtype=torch.complex64)
    with pytest.raises(
        InvalidValue, match="layer '0': dtype=torch.float16 would drop .* gradient of its complex output"
    ):
        with capture(model, grads=True, dtype=torch.float16, reduce=torch.abs):
            model(x)
    with capture(model, grads=True, dtype=torch.complex128) as acts:
        model(x).abs().square().sum().backward()
    expected = 2 * model(x).detach()  # d|z|²/dz, as torch writes it
    torch.testing.assert_close(acts.calls("0")[0].grad, expected.to(torch.complex128))


def test_reduce_does_not_apply_to_grads():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, reduce=lambda t: t.mean(-1), grads=True) as acts:
        loss_of(model(x)).backward()
    assert acts["one"].shape == (2, 3)
    torch.testing.assert_close(acts.calls()[0].grad, model.reference(x)[0])


def test_a_kept_grad_survives_changes_in_place():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, "two", grads=True) as acts:
        y = model(x)
        y.register_hook(lambda g: g.mul_(1))
    loss_of(y).backward()
    expected = model.reference(x)[1]
    model.zero_grad()
    torch.testing.assert_close(acts.calls()[0].grad, expected)


def test_keep_last_frees_the_grads_of_earlier_calls():
    model, x = Repeated(), torch.randn(2, 2, 9)
    with capture(model, keep="last", grads=True) as acts:
        loss_of(model(x)).backward()
    assert len(acts.calls()) == 1
    torch.testing.assert_close(acts.calls()[0].grad, model.reference(x)[2])


def test_grads_are_freed_with_the_activations_while_the_graph_lives():
    model, x = Inplace(), torch.randn(2, 1, 9)
    gc.collect()
    gc.disable()
    try:
        with capture(model, grads=True) as acts:
            y = model(x)
        loss_of(y).backward(retain_graph=True)
        call = acts.calls()[0]
        dead = [weakref.ref(call.grad), weakref.ref(call.output)]
        del call, acts
        assert [reference() for reference in dead] == [None, None]
        loss_of(y).backward()  # the hooks are still on the graph, and find nothing to bring the gradient to
    finally:
        gc.enable()


def test_the_graph_is_freed_while_the_activations_live():
    model, x = Inplace(), torch.randn(2, 1, 9)
    gc.disable()
    try:
        with capture(model, grads=True) as acts:
            y = model(x)
        graph = weakref.ref(y)
        loss_of(y).backward()
        del y
        assert graph() is None
        assert acts.calls()[0].grad is not None
    finally:
        gc.enable()


def test_max_bytes_counts_the_gradients_beforehand():
    model, x = Inplace(), torch.randn(1, 1, 100)
    # one: 3 * 100 * 4 bytes and as many for its gradient; two: 2 * 100 * 4, twice
    with capture(model, grads=True, max_bytes=4000) as acts:
        model(x)
    assert acts.nbytes == 4000
    with pytest.raises(MemoryLimitExceeded, match="'two'"), capture(model, grads=True, max_bytes=3999):
        model(x)


def test_grad_without_grads_says_what_to_write():
    model = Inplace()
    with capture(model) as acts:
        model(torch.randn(1, 1, 9))
    with pytest.raises(NotCaptured, match=r"the gradient of 'one' was not captured.*grads=True"):
        _ = acts.calls()[0].grad


def test_an_output_without_a_graph_is_told():
    model = Inplace()
    with capture(model, grads=True) as acts, torch.no_grad():
        model(torch.randn(1, 1, 9))
    with pytest.raises(
        NotCaptured, match=r"'one' has no gradient, since its output does not require a gradient.*no_grad"
    ):
        _ = acts.calls()[0].grad


def test_grads_of_inputs_are_refused():
    with pytest.raises(InvalidValue, match=r"gradients of outputs.*at='input'"):
        capture(Inplace(), at="input", grads=True)


def test_inside_a_torch_func_transform_it_is_told():
    model, x = nn.Sequential(nn.Conv1d(1, 2, 3)), torch.randn(2, 1, 9)
    with capture(model, grads=True) as acts:
        torch.func.grad(lambda x: loss_of(model(x)))(x)
    with pytest.raises(
        NotCaptured, match=r"'0' has no gradient, since it ran inside a torch.func transform.*loss.backward\(\)"
    ):
        _ = acts.calls()[0].grad


def test_layers_inside_torchscript_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        model = torch.jit.script(nn.Sequential(nn.Conv1d(1, 2, 3)))
    with (
        pytest.raises(Unsupported, match=r"grads=True does not work for layers inside TorchScript"),
        capture(model, grads=True),
    ):
        model(torch.randn(1, 1, 9))


def test_copies_and_pickles_of_what_was_collected_have_the_grads():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, grads=True) as acts:
        loss_of(model(x)).backward()
    for twin in (copy.deepcopy(acts), pickle.loads(pickle.dumps(acts))):
        for call, expected in zip(twin.calls(), model.reference(x), strict=True):
            torch.testing.assert_close(call.grad, expected)
            call.grad.zero_()
    torch.testing.assert_close(acts.calls()[0].grad, model.reference(x)[0])


def test_offload_takes_the_grads_along():
    model, x = Inplace(), torch.randn(2, 1, 9)
    with capture(model, offload="cpu", grads=True) as acts:
        y = model(x)
    loss_of(y).backward()
    for call, expected in zip(acts.calls(), model.reference(x), strict=True):
        assert call.grad.device.type == "cpu"
        torch.testing.assert_close(call.grad, expected)


def test_two_outputs_that_are_one_tensor_each_have_its_grad():
    model, x = nn.Sequential(nn.Sequential(nn.Conv1d(1, 2, 3)), nn.ReLU(inplace=True)), torch.randn(2, 1, 9)
    with capture(model, ["0", "0.0"], grads=True) as acts:
        loss_of(model(x)).backward()
    out = model[0](x)
    (expected,) = by_hand([out], loss_of(out.relu()))
    for call in acts.calls():
        torch.testing.assert_close(call.grad, expected)


def test_a_view_of_the_input_is_left_to_the_model():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten(0, 1)
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            y = self.conv(x)
            self.flat(y).mul_(2)  # means y: a replacement would end that
            return y

    model, x = Writes(), torch.randn(2, 1, 9)
    plain = model(x)
    with capture(model, types=(nn.Conv1d, nn.Flatten), grads=True) as acts:
        y = model(x)
    assert torch.equal(y, plain)
    loss_of(y).backward()
    out = model.conv(x)
    torch.testing.assert_close(acts.calls("conv")[0].grad, by_hand([out], loss_of(out * 2))[0])
