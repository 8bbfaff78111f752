"""``finite``: planted faults, each in a place that is known from how the model was made."""

import contextvars
import copy
import gc
import math
import pickle
import re
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from convtap._debug.finite import finite
from convtap._errors import CoverageWarning, InvalidValue, LayerNotFound, NonFiniteOutput, Unsupported

NAN = float("nan")


class Log(nn.Module):
    """A module that makes NaN from negative numbers."""

    def forward(self, x):
        return x.log()


def divide(y, number):
    return 1 / number


def in_thread(function, *args):
    thread = threading.Thread(target=function, args=args, name="worker")
    thread.start()
    thread.join()


def chain():
    """Ten layers; `bad` (a child of `middle`) is the one that makes NaN from what is finite."""
    middle = nn.Sequential()
    middle.add_module("conv", nn.Conv1d(2, 2, 3, padding=1))
    middle.add_module("bad", Log())
    middle.add_module("after", nn.Conv1d(2, 2, 3, padding=1))
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), middle, nn.Conv1d(2, 1, 3))


def x(length=12, batch=2):
    return torch.linspace(-1, 1, batch * length).reshape(batch, 1, length)


def test_the_producer_is_named_and_not_what_passes_it_on():
    with finite(chain(), raise_at="never") as f:
        y = chain_output = f._model(x())
    assert chain_output.isnan().any()
    assert (f.first.layer, f.first.type, f.first.where, f.first.what) == ("2.bad", "Log", "output", "NaN")
    assert (f.first.index, f.first.forward) == (0, 0)
    assert y is chain_output


def test_position_count_and_ranges_are_those_of_the_tensor():
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Conv1d(3, 3, 1))
    data = torch.zeros(2, 1, 5)
    data[1, 0, 3] = 1e30
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([0.0, -2.0, 4.0]))
        model[1].weight.zero_()
        model[1].weight[2, 0, 0] = 1e30  # 1e30 * 1e30 overflows, in channel 2 only
        model[1].bias.zero_()
    with finite(model, raise_at="never") as f:
        model(data)
    first = f.first
    assert (first.layer, first.what) == ("1", "Inf")
    assert first.position == (1, 2, 3)
    assert first.count == 1
    assert first.shape == (2, 3, 5)
    assert [(r.low, r.high) for r in first.inputs] == [(-2.0, pytest.approx(1e30))]
    assert {r.name: (r.low, r.high) for r in first.weights} == {
        "weight": (0.0, pytest.approx(1e30)),
        "bias": (0.0, 0.0),
    }
    assert "1 of 30, the first at sample 1, channel 2, time 3 (shape (2, 3, 5), float32)" in str(first)
    assert "Its input: [-2, 1e+30], its weight [0, 1e+30], its bias [0, 0]." in str(first)


def test_ranges_are_of_what_is_finite_and_count_the_rest():
    model = nn.Sequential(nn.Conv1d(1, 16, 3), nn.Conv1d(16, 1, 1))
    with torch.no_grad():
        model[0].weight[3] = NAN  # one bad row of sixteen
        model[0].weight[5, 0, 0] = -math.inf
        model[0].bias.fill_(NAN)
    with finite(model, raise_at="never") as f:
        model(torch.ones(1, 1, 8))
    numbers = model[0].weight.detach().numpy()
    good = numbers[np.isfinite(numbers)]
    weight, bias = f.first.weights
    assert (weight.low, weight.high, weight.nan, weight.inf) == (good.min(), good.max(), 3, 1)
    assert str(weight) == f"weight [{good.min():.4g}, {good.max():.4g}] and 3 NaN and 1 Inf"
    assert math.isnan(bias.low)
    assert (bias.nan, bias.inf, str(bias)) == (16, 0, "bias without a finite value (16 NaN)")
    assert f"its {weight}, its {bias}. The cause: its weight, bias already holds NaN or Inf." in str(f.first)


def test_ranges_of_masked_inputs_count_their_infinities():
    class Difference(nn.Module):
        def forward(self, x, y):
            return x - y

    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.minus = Difference()

        def forward(self, x):
            masked = x.masked_fill(torch.arange(8) > 5, -math.inf)
            return self.minus(masked, y=masked + 1) + self.minus(x, torch.complex(x, masked)).real

    with finite(Masks(), raise_at="never", inf=False) as f:
        f._model(torch.arange(8.0).reshape(1, 1, 8))
    assert [str(found) for found in f.first.inputs] == ["[0] [0, 5] and 2 Inf", "[y] [1, 6] and 2 Inf"]
    assert "Its input: [0] [0, 5] and 2 Inf, [y] [1, 6] and 2 Inf." in str(f.first)


def test_an_element_of_a_complex_tensor_is_counted_once():
    value = torch.zeros(2, 3, dtype=torch.complex64)
    value[0, 0], value[1, 1], value[1, 2] = complex(NAN, NAN), complex(NAN, math.inf), complex(2, -math.inf)
    model = nn.Linear(1, 1)
    model.register_buffer("phase", value)
    with finite(model, raise_at="never") as f:
        model(torch.full((1, 1), NAN))
    assert f.first.where == "input"
    (phase,) = [found for found in f.first.weights if found.name == "phase"]
    assert (phase.low, phase.high, phase.nan, phase.inf) == (0.0, 2.0, 2, 1)


def test_raising_at_the_exit_is_the_default():
    model = chain()
    with (
        pytest.raises(
            NonFiniteOutput, match=r"'2.bad' \(Log\) \(call 0, forward pass 0\) produces NaN from finite inputs"
        ),
        finite(model),
    ):
        model(x())


def test_raise_at_layer_raises_where_the_layer_runs():
    model, ran = chain(), []
    model[3].register_forward_hook(lambda *_: ran.append("last"))
    with pytest.raises(NonFiniteOutput, match=r"'2.bad'"), finite(model, raise_at="layer") as f:
        model(x())
    assert not ran
    assert f.first.layer == "2.bad"


def test_an_error_that_the_model_swallows_is_raised_at_the_exit():
    class Swallows(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Log()

        def forward(self, x):
            try:
                return self.part(x)
            except Exception:
                return x

    model = Swallows()
    with pytest.raises(NonFiniteOutput, match="'part'"), finite(model, raise_at="layer"):
        model(x())


def test_the_body_s_own_exception_is_not_hidden():
    model = chain()
    with pytest.raises(ZeroDivisionError), finite(model) as f:
        divide(model(x()), 0)
    assert f.first.layer == "2.bad"


def test_an_empty_body_and_a_finite_model_are_silent():
    with finite(chain()) as f:
        pass
    assert f.first is None
    model = nn.Conv1d(1, 1, 3)
    with finite(model) as f:
        model(x())
    assert f.first is None
    assert repr(f) == "<finite: no NaN or Inf in 1 call>"


def test_the_input_s_fault_is_named_as_such():
    model = chain()
    match = r"the input of '\(root\)' \(Sequential\) .* already holds NaN, before any layer ran: all 24"
    with pytest.raises(NonFiniteOutput, match=match), finite(model):
        model(torch.full((2, 1, 12), NAN))


def test_a_bad_keyword_input_is_named():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, *, audio, scale):
            return self.conv(audio) * scale

    model = Keyword()
    with pytest.raises(NonFiniteOutput, match=r"'\[scale\]' in its structure"), finite(model):
        model(audio=x(), scale=torch.tensor(math.inf))


def test_the_code_between_two_layers_is_named():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(1, 1, 3)
            self.two = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            y = self.two((self.one(x) * 0 - 1).sqrt())
            return torch.nan_to_num(y)  # the output of the whole hides it

    model = nn.Sequential(Between())
    with finite(model, raise_at="never") as f:
        assert model(x()).isfinite().all()
    assert (f.first.layer, f.first.where) == ("0", "code")
    assert "'0' (Between) (call 0, forward pass 0) produces NaN in its own code, after 'one' and before" not in str(
        f.first
    )
    assert "produces NaN in its own code, after '0.one' and before '0.two'" in str(f.first)


def test_code_after_the_last_part_is_named():
    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.one(x) / 0

    model = After()
    with (
        pytest.raises(NonFiniteOutput, match=r"'\(root\)' \(After\).*finite inputs, in its own code after 'one'"),
        finite(model),
    ):
        model(x())


def test_a_bad_weight_is_named_as_the_cause():
    model = chain()
    with torch.no_grad():
        model[2].conv.weight[0, 0, 0] = NAN
    with finite(model, raise_at="never") as f:
        model(x())
    assert f.first.layer == "2.conv"
    assert "The cause: its weight already holds NaN or Inf." in str(f.first)


def test_the_call_number_of_a_repeated_layer():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = Log()

        def forward(self, x):
            return self.log(self.log(self.log(x)))  # log(log(log(5))) is a number; log(log(log(2))) is not

    model = Again()
    with finite(model, raise_at="never") as f:
        model(torch.full((1, 1, 4), 5.0))
        model(torch.full((1, 1, 4), 2.0))
    assert (f.first.layer, f.first.index, f.first.forward) == ("log", 5, 1)


def test_inf_false_lets_masks_pass_and_still_finds_nan():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.soft = nn.Softmax(-1)

        def forward(self, x, mask):
            return self.soft(x + mask)

    model = Masked()
    mask = torch.zeros(12)
    mask[3:] = -math.inf
    with finite(model, inf=False) as f:
        model(x(), mask)
    assert f.first is None
    with (
        pytest.raises(NonFiniteOutput, match=r"holds -Inf.*If it belongs to a mask, pass inf=False"),
        finite(model),
    ):
        model(x(), mask)
    mask[:] = -math.inf  # softmax over nothing
    with pytest.raises(NonFiniteOutput, match=r"'soft'.*produces NaN"), finite(model, inf=False):
        model(x(), mask)


def test_types_leave_the_rest_to_the_code_around():
    model = chain()
    with finite(model, types=nn.Conv1d, raise_at="never") as f:
        model(x())
    assert (f.first.layer, f.first.where) == ("(root)", "code")
    assert "after '2.conv' and before '2.after'" in str(f.first)
    assert "exclude were not watched" in str(f.first)


def test_low_precision_overflow_is_found_in_half_and_not_in_bfloat16():
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(300.0)
    for dtype, layer in ((torch.float16, "1"), (torch.bfloat16, None)):
        with finite(model.to(dtype), raise_at="never") as f:
            model(torch.ones(1, 1, 4, dtype=dtype))
        assert (f.first and f.first.layer) == layer  # 300 * 600 + 300 > 65504


def test_sums_that_overflow_are_no_finding():
    model = nn.Identity()
    with finite(model) as f:
        model(torch.full((1, 1, 8), 3e38))
    assert f.first is None


@pytest.mark.parametrize("value", [torch.zeros(0), torch.arange(3), torch.zeros(2, dtype=torch.complex64)])
def test_tensors_without_numbers_to_check_pass(value):
    with finite(nn.Identity()) as f:
        f._model(value)
    assert f.first is None


def test_a_complex_nan_has_its_own_index():
    value = torch.zeros(2, 3, dtype=torch.complex64)
    value[1, 1] = complex(0, NAN)
    with finite(nn.Identity(), raise_at="never") as f:
        f._model(value)
    assert f.first.position == (1, 1)


def test_inference_mode():
    model = chain()
    with pytest.raises(NonFiniteOutput, match=r"2\.bad"), finite(model), torch.inference_mode():
        model(x())


def test_an_inplace_operation_on_a_seen_tensor_is_seen():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(1, 1, 3)
            self.two = nn.ReLU()

        def forward(self, x):
            y = self.one(x)
            y[0, 0, 0] = NAN
            return self.two(y)

    model = Writes().eval()
    with finite(model, raise_at="never") as f, torch.no_grad():
        model(x())
    assert (f.first.layer, f.first.where, f.first.position) == ("(root)", "code", (0, 0, 0))


# -- backward


class Root(nn.Module):
    """The gradient of sqrt at zero is infinite, though the value is fine."""

    def forward(self, x):
        return (x * 0).sqrt()


def test_the_layer_whose_gradient_turns_first_is_named():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), Root(), nn.Conv1d(2, 1, 3))
    with (
        pytest.raises(
            NonFiniteOutput, match=r"the backward pass of '2' \(Root\) .* produces NaN in the gradient of its input"
        ),
        finite(model, backward=True),
    ):
        model(x()).sum().backward()
    assert all(module._forward_hooks == {} for module in model.modules())


def test_the_loss_s_fault_is_named_as_such():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
    match = r"the loss produces Inf in the gradient of the output of '\(root\)'"
    with pytest.raises(NonFiniteOutput, match=match), finite(model, backward=True):
        model(x()).mul(math.inf).sum().backward()


def test_code_between_layers_is_named_in_backward_too():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(1, 1, 3)
            self.two = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.two((self.one(x) * 0).sqrt())

    model = Between()
    with finite(model, backward=True, raise_at="never") as f:
        model(x()).sum().backward()
    assert (f.first.layer, f.first.where) == ("(root)", "gradient")
    assert "in its own code, after 'one'" in str(f.first)


def test_a_weight_s_gradient_that_overflows_is_named():
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].bias.fill_(1e38)
        model[1].weight.fill_(1e-38)
    with finite(model, backward=True, raise_at="never") as f:
        model(x()).sum().backward()  # d/dw of the second: 24 times 1e38, more than float32 holds
    assert (f.first.layer, f.first.what) == ("1", "Inf")
    assert "the gradient of its weight" in str(f.first)


def test_inplace_activations_and_results_are_as_without_the_block():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv1d(2, 1, 3), nn.ReLU(inplace=True))
    model(x()).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with finite(model, backward=True) as f:
        model(x()).sum().backward()
    assert f.first is None
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_looked_at_once_and_their_gradients_too(reentrant):
    inner = nn.Sequential(nn.Conv1d(1, 2, 3), Root(), nn.Conv1d(2, 1, 3))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, data = Checkpointed(), x().requires_grad_()
    with finite(model, backward=True, raise_at="never") as f:
        model(data).sum().backward()
    assert f._watch.calls == 5  # root, inner, and three parts
    assert (f.first.layer, f.first.where) == ("inner.1", "gradient")


def test_backward_that_runs_after_the_block_is_told():
    model = chain()[:2]
    match = r"saw no gradient of a layer.*loss.backward\(\) inside it"
    with pytest.warns(CoverageWarning, match=match), finite(model, backward=True):
        y = model(x())
    y.sum().backward()


def test_another_model_s_backward_does_not_count():
    model = nn.Conv1d(1, 1, 3)

    def other(y):
        (model.weight * math.inf).sum().backward()  # a backward pass, but of no forward pass of the block

    with pytest.warns(CoverageWarning, match="no gradient"), finite(model, backward=True):
        other(torch.no_grad()(model)(x()))


# -- what is left behind, and who is watched


def test_the_model_is_left_as_it_was():
    model = chain()
    before = {
        name: {k: v for k, v in vars(module).items() if k != "_parameters"} for name, module in model.named_modules()
    }
    before = copy.deepcopy(before)
    with finite(model, backward=True, raise_at="never"):
        model(x()).sum().backward()
    for name, module in model.named_modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called"):
            assert getattr(module, hooks) == before[name][hooks] == {}
    assert all(parameter._backward_hooks is None for parameter in model.parameters())


def test_hooks_are_removed_when_forward_raises():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="shape"), finite(model):
        model(x())
    assert all(module._forward_hooks == {} and module._forward_pre_hooks == {} for module in model.modules())


def test_a_pass_that_raised_does_not_confuse_the_next_one():
    class Fails(nn.Module):
        fail = True

        def forward(self, x):
            if self.fail:
                raise KeyboardInterrupt
            return x.log()

    model = nn.Sequential(nn.Sequential(Fails()))
    with finite(model, raise_at="never") as f:
        with pytest.raises(KeyboardInterrupt):
            model(x())
        model[0][0].fail = False
        model(x())
    assert (f.first.layer, f.first.where, f.first.forward, f.first.index) == ("0.0", "output", 1, 1)


def test_deepcopy_and_pickle_inside_the_block():
    model = nn.Sequential(nn.Conv1d(1, 1, 3))
    with finite(model, backward=True, raise_at="never") as f:
        twin = copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))
        twin(torch.full((1, 1, 8), NAN)).sum().backward()
        assert f.first is None
        model(x()).sum().backward()
    assert f.first is None


def test_another_thread_s_forward_is_not_judged_and_is_told():
    model = nn.Conv1d(1, 1, 3)
    bad = torch.full((1, 1, 8), NAN)
    with pytest.warns(CoverageWarning, match=r"another thread.*worker"), finite(model):
        in_thread(model, bad)
    with pytest.raises(NonFiniteOutput), finite(model):
        in_thread(contextvars.copy_context().run, model, bad)


def test_nothing_is_kept_alive():
    model = chain()
    gc.disable()
    try:
        with finite(model, backward=True, raise_at="never") as f:
            y = model(x())
            y.nansum().backward()
        reference = weakref.ref(y)
        del y
        assert reference() is None
        assert f.first is not None
        reference = weakref.ref(model)
        del model, f
        assert reference() is None
    finally:
        gc.enable()


def test_a_transformer_s_fast_path_is_left_alone():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class WithEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, padding):
            return self.encoder(self.conv(x).transpose(1, 2), src_key_padding_mask=padding)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = WithEncoder().eval()
        data, padding = torch.randn(2, 8, 6), torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
        with torch.no_grad():
            plain = model(data, padding)
            with finite(model):
                watched = model(data, padding)
            assert torch.equal(plain, watched)
            model.encoder.layers[0].linear1.weight.fill_(NAN)
            with finite(model, raise_at="never") as f:
                model(data, padding)
            assert f.first.layer == "(root)"
            assert "Not watched, since hooks would change their results: encoder." in str(f.first)
            with finite(model.train(), raise_at="never", inf=False) as f:  # torch turns the mask into −inf
                model(data, padding)
            assert f.first.layer == "encoder.layers.0.linear1"
            with pytest.raises(Unsupported, match=r"fast path.*model.train\(\)"):
                finite(model.encoder.eval())


def test_a_compiled_model_runs_eagerly_and_the_message_says_so():
    model = chain()
    compiled = torch.compile(model, backend="eager")
    match = r"'2.bad'.*ran eagerly here.*tapped\(model, reduce"
    with pytest.raises(NonFiniteOutput, match=match), finite(compiled):
        compiled(x())
    compiled = torch.compile(chain(), backend="eager")
    compiled(x())  # compiled before the block
    with pytest.raises(NonFiniteOutput, match=r"2\.bad"), finite(compiled):
        compiled(x())


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(Unsupported, match="TorchScript"):
        finite(scripted)


def test_bad_arguments():
    with pytest.raises(InvalidValue, match="raise_at='end' is invalid. Pass one of 'exit', 'layer', 'never'"):
        finite(chain(), raise_at="end")
    with pytest.raises(LayerNotFound, match="Did you mean"):
        finite(chain(), "2.bat")


def test_vmap_is_looked_through():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), Log())
    with finite(model, raise_at="never") as f:
        torch.vmap(model)(torch.zeros(3, 2, 1, 8) - 1)
    assert f.first.layer in ("1", "0")
    assert f.first.what in ("NaN", "-Inf")


def test_code_after_two_parts_is_the_code_of_the_module_around_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(1, 1, 3)
            self.b = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return F.softplus(self.a(x)) + (self.b(x) * 0 - 1).log()

    model = Two()
    with finite(model, raise_at="never") as f:
        model(x())
    assert (f.first.layer, f.first.where) == ("(root)", "output")


# -- where reading a number would wait for the device


@pytest.fixture
def reads(monkeypatch):
    """Treats the CPU as a device that must not be waited for, and counts how often numbers are read from it."""
    from convtap._debug import probe as _probe

    monkeypatch.setattr(_probe, "READ_AT_ONCE", set())
    count = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, original=original):
            count.append(self.numel())
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    return count


def test_an_accelerator_is_read_once_a_block_and_not_once_a_layer(reads):
    model = nn.Sequential(*[nn.Conv1d(1, 1, 3, padding=1) for _ in range(40)])
    with finite(model) as f:
        model(x())
        model(x())
        assert reads == []
    assert f.first is None
    assert len(reads) == 1
    assert reads[0] == 2 * 2 * 41  # least and greatest of the input and 40 outputs, in two passes


def test_what_is_read_late_names_the_same_layer_and_place(reads):
    with finite(chain(), raise_at="never") as f:
        f._model(torch.full((1, 1, 12), -1.0))
    assert (f.first.layer, f.first.where, f.first.index, f.first.forward) == ("2.bad", "output", 0, 0)
    assert f.first.position is not None
    assert f.first.count is None
    assert math.isfinite(f.first.inputs[0].low)
    assert "one of 20 elements, at index" in str(f.first)


@pytest.mark.parametrize(("value", "kind"), [(NAN, "NaN"), (math.inf, "Inf"), (-math.inf, "-Inf")])
def test_the_place_of_each_kind_is_found_late(reads, value, kind):
    data = torch.zeros(2, 3, 5)
    data[1, 2, 3] = value
    with finite(nn.Identity(), raise_at="never") as f:
        f._model(data)
    assert (f.first.what, f.first.position) == (kind, (1, 2, 3))


def test_what_is_read_late_says_that_it_is_not_finite_without_counting(reads):
    model = nn.Sequential(nn.Identity(), nn.Softmax(-1))
    with finite(model, raise_at="never", inf=False) as f:
        model(torch.full((1, 4), -math.inf))
    (given,) = f.first.inputs
    assert (f.first.layer, given.nan, given.inf, str(given)) == ("1", None, None, "with NaN or Inf")
    model = nn.Sequential(nn.Conv1d(1, 2, 1))
    with torch.no_grad():
        model[0].weight[0] = NAN
    with finite(model, raise_at="never") as f:
        model(torch.ones(1, 1, 4))
    weight = f.first.weights[0]  # which is still there
    assert (weight.low, weight.high, weight.nan) == (model[0].weight[1].item(), model[0].weight[1].item(), 1)


def test_raise_at_layer_reads_at_every_layer(reads):
    model, ran = chain(), []
    model[3].register_forward_hook(lambda *_: ran.append("last"))
    with pytest.raises(NonFiniteOutput, match=r"'2\.bad'"), finite(model, raise_at="layer"):
        model(x())
    assert not ran


def test_gradients_are_read_late_too(reads):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), Root(), nn.Conv1d(2, 1, 3))
    with finite(model, backward=True, raise_at="never") as f:
        model(x()).sum().backward()
        assert reads == []
    assert (f.first.layer, f.first.where) == ("1", "gradient")


def test_what_waits_to_be_read_is_bounded(reads, monkeypatch):
    from convtap._debug import watch as _watch

    monkeypatch.setattr(_watch, "_READ_AFTER", 10)
    model = nn.Sequential(*[nn.Conv1d(1, 1, 3, padding=1) for _ in range(24)])
    with finite(model) as f:
        model(x())
        assert len(reads) == 2
        assert len(f._watch._pending) == 5  # 25 tensors, ten at a time


def test_parts_in_torchscript_are_said_to_be_unseen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        part = torch.jit.script(nn.Sequential(nn.Conv1d(1, 1, 1), Log()))
        model = nn.Sequential(part)
        with finite(model, raise_at="never") as f:
            model(torch.full((1, 1, 4), -1e3))
        if f.first is None:  # the random weight turned the sign
            with finite(model, raise_at="never") as f:
                model(torch.full((1, 1, 4), 1e3))
    assert f.first.layer == "0"
    assert "TorchScript calls no hooks, so the submodules of these count as their own code: 0" in str(f.first)


@pytest.mark.parametrize(
    ("layer", "shape", "place"),
    [
        (nn.Linear(3, 5), (2, 9, 3), "sample 1, channel 4, time 7"),
        (nn.LayerNorm(5), (2, 9, 5), "sample 1, channel 4, time 7"),
        (nn.Conv1d(3, 9, 1), (2, 3, 5), "sample 1, channel 7, time 4"),
        (nn.ReLU(), (2, 9, 5), r"index \(1, 7, 4\)"),
    ],
    ids=["Linear", "LayerNorm", "Conv1d", "ReLU"],
)
def test_the_place_of_a_nan_has_the_names_of_the_layers_own_axes(layer, shape, place):
    def spoil(module, args, output):
        output = output.detach().clone()
        output[1, 7, 4] = float("nan")
        return output

    layer.register_forward_hook(spoil)
    with finite(layer, raise_at="never") as found:
        layer(torch.randn(shape))
    assert re.search(place, str(found.first))


class DividesBetweenLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 2, 1)
        self.second = nn.Conv1d(2, 2, 1)

    def encode(self, x):
        return self.second(self.first(x) / torch.zeros(1))


def test_a_nan_between_two_layers_of_a_method_is_blamed_on_the_method():
    model = DividesBetweenLayers()
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    with finite(model, raise_at="never") as found:
        model.encode(torch.ones(1, 1, 4))
        model.encode(torch.ones(1, 1, 4))
    assert (found.first.layer, found.first.where, found.first.forward) == ("(root)", "code", 0)
    assert (
        "'(root)' (DividesBetweenLayers.encode) produces NaN in its own code, after 'first' and before 'second'"
        in str(found.first)
    )


def test_a_nan_in_the_input_of_a_method_is_blamed_on_the_input():
    model = DividesBetweenLayers()
    with finite(model, raise_at="never") as found:
        model.encode(torch.full((1, 1, 4), torch.nan))
    assert (found.first.layer, found.first.where) == ("first", "input")


def test_a_nan_between_two_layers_that_are_called_one_by_one_names_the_layer_before():
    model = DividesBetweenLayers()
    with finite(model, raise_at="never") as found:
        x = model.first(torch.ones(1, 1, 4))
        model.second(x * torch.nan)
    assert (found.first.layer, found.first.where) == ("second", "input")
    assert "already holds NaN, but the output of 'first' before it is finite" in str(found.first)
