"""The mapping: values, order, keys, repeated calls, passes, samples."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from convtap import AmbiguousCall, Call, LayerNotFound, NotCaptured, Unsupported, capture, list_layers
from convtap._errors import OutOfRange
from tests.models import (
    AfterConv,
    BranchOnData,
    CatchesItsLayersError,
    FiveConvs,
    KeywordOnly,
    Pair,
    ReusedConv,
    SharedConv,
    StructuredOutputs,
    TwoParts,
)
from tests.reference import cloning_hooks, same


def test_every_conv1d_is_captured_in_execution_order_with_its_value():
    model, x = FiveConvs(inplace=True), torch.randn(3, 1, 50)
    with cloning_hooks(model) as expected:
        plain = model(x)
    with capture(model) as acts:
        y = model(x)
    assert torch.equal(y, plain)
    assert list(acts) == [f"convs.{i}" for i in range(5)]
    assert same(list(acts.items()), expected)


def test_a_layer_that_ran_several_times_has_numbered_keys():
    model, x = ReusedConv(), torch.randn(2, 4, 20)
    with cloning_hooks(model) as expected:
        model(x)
    with capture(model) as acts:
        model(x)
    assert list(acts) == ["conv#0", "conv#1", "conv#2", "last"]
    assert same([call.output for call in acts.calls()], [output for _, output in expected])
    assert [call.index for call in acts.calls("conv")] == [0, 1, 2]
    assert same(acts.cat("conv", dim=-1), torch.cat([output for name, output in expected if name == "conv"], -1))
    assert "conv" in acts
    assert "conv#3" not in acts


@pytest.mark.parametrize("read", [lambda acts: acts["conv"], lambda acts: acts.get("conv")])
def test_the_plain_name_of_a_repeated_layer_is_ambiguous(read):
    model = ReusedConv()
    with capture(model) as acts:
        model(torch.randn(2, 4, 20))
    with pytest.raises(
        AmbiguousCall, match=r"^'conv' ran 3 times.*acts\['conv#1'\].*acts.calls\('conv'\).*acts.cat\('conv'\)"
    ):
        read(acts)


def test_keep_last_keeps_the_last_call_under_the_plain_name():
    model, x = ReusedConv(), torch.randn(2, 4, 20)
    with cloning_hooks(model) as expected:
        model(x)
        model(2 * x)
    with capture(model, keep="last") as acts:
        model(x)
        model(2 * x)
    assert list(acts) == ["conv", "last"]
    assert same(acts["conv"], expected[-2][1])
    assert acts.calls("conv")[0].index == 5
    assert acts.coverage["conv"].captured == 6


def test_keep_last_keeps_nothing_of_passes_that_are_gone():
    model, x = TwoParts(), torch.randn(2, 1, 20)
    with capture(model, keep="last") as acts:
        for _ in range(200):
            model(x)
    assert len(acts._log.inputs) < 30
    assert {call.forward for call in acts.calls()} == {199}
    assert len(acts.samples()) == 2


def test_passes_are_numbered_and_their_calls_kept_apart():
    model, x = TwoParts(), torch.randn(2, 1, 20)
    with capture(model) as acts:
        model(x)
        model(x + 1)
    assert [(call.key, call.forward) for call in acts.calls()] == [
        ("encoder.0#0", 0),
        ("decoder.0#0", 0),
        ("encoder.0#1", 1),
        ("decoder.0#1", 1),
    ]
    assert [call.key for call in acts.calls(forward=1)] == ["encoder.0#1", "decoder.0#1"]


def test_parts_that_are_called_one_by_one_are_one_pass_until_one_is_called_again():
    model, x = TwoParts(), torch.randn(2, 1, 20)
    with capture(model) as acts:
        code = model.encoder(x)
        model.encoder(x)
        model.decoder(code)
        model(x)
        model.encoder(x)
    assert [call.forward for call in acts.calls()] == [0, 1, 1, 2, 2, 3]
    with pytest.raises(Unsupported, match="cannot be split by input, since 'decoder' was called by itself"):
        acts.samples()  # the code is of the first call of the encoder, and nothing says so


def test_a_pass_that_raised_does_not_swallow_the_next_one():
    model, x = TwoParts(), torch.randn(2, 1, 20)
    with capture(model) as acts:
        model(x)
        with pytest.raises(RuntimeError, match="expected input"):
            model(torch.randn(2, 2, 20))
        model(x)
    assert [call.forward for call in acts.calls()] == [0, 0, 2, 2]


def test_a_layer_that_raises_and_is_caught_leaves_nothing_out_of_step():
    model, x = CatchesItsLayersError(), torch.randn(2, 1, 20)
    with capture(model) as acts:
        y = model(x)
    assert torch.equal(y, model(x))
    assert [(call.key, call.via) for call in acts.calls()] == [("a#0", "module"), ("b", "module"), ("a#1", "function")]
    assert torch.equal(acts["b"], model.b(model.a(x) * 2))


def test_only_the_branch_that_ran_is_captured():
    model = BranchOnData()
    with capture(model) as acts:
        model(torch.ones(1, 1, 9))
    assert list(acts) == ["high"]
    assert acts.coverage.idle == ["low"]
    with pytest.raises(LayerNotFound, match=r"^'low' was selected, but it is idle.*Captured here: high"):
        acts["low"]


def test_structures_are_kept_with_their_values():
    model, x = StructuredOutputs(), torch.randn(2, 1, 12)
    first = nn.Conv1d.forward(model.t, x).detach()
    with capture(model) as acts:
        model(x)
    assert same(acts["t"], (first, (first * 2, None)))
    assert same(acts["d"], {"y": nn.Conv1d.forward(model.d, first.relu()), "n": 3})
    assert isinstance(acts["p"], Pair)
    assert same(acts["p"].hidden, nn.Conv1d.forward(model.p, acts["d"]["y"].relu()))
    assert acts["p"].mask is None
    assert "((2, 2, 12), ((2, 2, 12), None))" in str(acts)


def test_objects_that_are_no_tensors_are_named_and_not_kept():
    class Cache:
        pass

    class WithCache(nn.Conv1d):
        def forward(self, x):
            return super().forward(x), Cache()

    model = nn.ModuleDict({"c": WithCache(1, 1, 1)})
    with capture(model) as acts:
        model["c"](torch.ones(1, 1, 4))
    assert repr(acts["c"][1]) == "<not kept: Cache>"


def test_a_module_under_two_names_is_captured_once_and_both_names_resolve():
    model = SharedConv()
    with capture(model, "second.0") as acts:
        model(torch.randn(1, 3, 9))
    assert list(acts) == ["first"]
    assert torch.equal(acts["second.0"], acts["first"])


def test_a_root_that_is_a_conv1d_is_named_root():
    model, x = nn.Conv1d(1, 2, 3), torch.randn(1, 1, 9)
    with capture(model) as acts:
        model(x)
    assert list(acts) == ["(root)"]
    assert torch.equal(acts["(root)"], model(x))


def test_keyword_only_models_and_layers_called_by_keyword():
    model, x = KeywordOnly(), torch.randn(2, 1, 9)
    for at, expected in (("output", model.conv(x)), ("input", x)):
        with capture(model, at=at) as acts:
            model(signal=x)
        assert torch.equal(acts["conv"], expected)


def test_at_input_gives_what_the_layer_was_given_even_if_it_is_overwritten_later():
    model, x = FiveConvs(inplace=True), torch.randn(2, 1, 30)
    inputs = []
    handles = [conv.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone())) for conv in model.convs]
    model(x)
    for handle in handles:
        handle.remove()
    with capture(model, at="input") as acts:
        model(x)
    x.zero_()
    assert same(list(acts.values()), inputs)


def test_functional_inputs_are_captured_as_well():
    model = CatchesItsLayersError()
    x = torch.randn(2, 1, 20)
    with capture(model, at="input") as acts:
        model(x)
    assert torch.equal(acts["a#1"], model.a(x) * 2)


def test_calls_describe_themselves():
    model = FiveConvs()
    with capture(model, "convs.1") as acts:
        model(torch.randn(3, 1, 50))
    (call,) = acts.calls()
    assert isinstance(call, Call)
    assert (call.name, call.key, call.index, call.forward, call.via) == ("convs.1", "convs.1", 0, 0, "module")
    assert (tuple(call.shape), call.dtype, call.device) == ((3, 4, 50), torch.float32, torch.device("cpu"))
    assert call.nbytes == 3 * 4 * 50 * 4
    assert acts.nbytes == call.nbytes


# -- for each input


def test_samples_are_the_rows_of_each_input():
    model, x = FiveConvs(), torch.randn(3, 1, 50)
    with cloning_hooks(model) as expected:
        model(x)
    with capture(model) as acts:
        model(x)
    samples = acts.samples()
    assert len(samples) == 3
    for i, sample in enumerate(samples):
        assert same(list(sample.items()), [(name, output[i]) for name, output in expected])
        assert same(acts.sample(i), sample)
        assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 4 for tensor in sample.values())
    assert same(acts.sample(-1), samples[2])


def test_samples_are_numbered_through_several_passes():
    model, x = FiveConvs(), torch.randn(5, 1, 20)
    with capture(model, "convs.4") as acts:
        model(x[:2])
        model(x[2:])
    with capture(model, "convs.4") as whole:
        model(x)
    assert len(acts.samples()) == 5
    for i in range(5):
        assert list(acts.sample(i)) == ["convs.4"]  # the name within its pass, and not acts' own key
        torch.testing.assert_close(acts.sample(i)["convs.4"], whole["convs.4"][i])


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 4, 3, padding=1)
        self.second = nn.Conv1d(4, 4, 3, padding=1)
        self.third = nn.Conv1d(4, 2, 3, padding=1)
        self.attached = lambda x: self.second(self.first(x).relu())

    def forward(self, x):
        return self.second(self.first(x).relu())

    def encode(model, x):  # noqa: N805
        return model.second(model.first(x).relu())

    def by_keyword(self, *, x):
        return self.second(self.first(x).relu())

    @torch.no_grad()
    def decorated(self, x):
        return self.second(self.first(x).relu())

    def starred(*args):
        model, x = args
        return model.second(model.first(x).relu())

    def around(self, x):
        return self.third(self(x))

    def many(self, xs):
        return [self.third(self(x)) for x in xs]

    def fit(self, xs):
        return [self(x) for x in xs]


def by_hand(model, x):
    first = nn.functional.conv1d(x, model.first.weight, model.first.bias, padding=1)
    return {
        "first": first,
        "second": nn.functional.conv1d(first.relu(), model.second.weight, model.second.bias, padding=1),
    }


def rows_of(model, xs):
    """Each input's outputs, from the definition alone."""
    return [{name: value[i] for name, value in by_hand(model, x).items()} for x in xs for i in range(len(x))]


METHODS = {
    "forward": lambda model, x: model.forward(x),
    "encode": lambda model, x: model.encode(x),
    "by class": lambda model, x: Methods.encode(model, x),
    "keyword": lambda model, x: model.by_keyword(x=x),
    "decorated": lambda model, x: model.decorated(x),
    "starred": lambda model, x: model.starred(x),
    "attached": lambda model, x: model.attached(x),
    "parts": lambda model, x: model.second(model.first(x).relu()),
}


def assert_rows(found, expected):
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name in row:
            torch.testing.assert_close(row[name], other[name])


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("grad", [True, False])
def test_samples_have_one_row_an_input_with_all_layers_whichever_method_is_called(way, grad):
    model, xs = Methods(), [torch.randn(2, 1, 20) for _ in range(3)]
    with torch.set_grad_enabled(grad), capture(model, ("first", "second")) as acts:
        for x in xs:
            METHODS[way](model, x)
    assert [call.forward for call in acts.calls()] == [0, 0, 1, 1, 2, 2]
    assert_rows(acts.samples(), rows_of(model, xs))


def test_a_method_that_was_looked_up_before_the_capture_is_a_pass_a_call():
    model, xs = Methods(), [torch.randn(1, 1, 20) for _ in range(4)]
    encode = model.encode
    with capture(model) as acts:
        for x in xs:
            encode(x)
    assert_rows(acts.samples(), rows_of(model, xs))


def test_layers_around_a_call_of_the_model_are_in_its_pass():
    model, xs = Methods(), [torch.randn(2, 1, 20) for _ in range(2)]
    with capture(model) as acts:
        outputs = [model.around(x) for x in xs]
    rows = [{**row, "third": outputs[i // 2][i % 2]} for i, row in enumerate(rows_of(model, xs))]
    assert_rows(acts.samples(), rows)


def test_a_method_that_calls_the_model_several_times_makes_as_many_passes():
    model, xs = Methods(), [torch.randn(2, 1, 20) for _ in range(3)]
    with capture(model) as acts:
        model.fit(xs)
    assert_rows(acts.samples(), rows_of(model, xs))
    with capture(model) as acts:
        model.many(xs)
    with pytest.raises(Unsupported, match="'many' called the whole model several times and also called layers"):
        acts.samples()
    with capture(model, ("first", "second")) as acts:
        model.many(xs)
    assert_rows(acts.samples(), rows_of(model, xs))  # no layer besides was captured


@pytest.mark.parametrize("grad", [True, False])
def test_a_loop_over_a_module_list_is_a_pass_an_input(grad):
    model, xs = FiveConvs(), [torch.randn(2, 1, 30) for _ in range(3)]
    with torch.set_grad_enabled(grad), capture(model) as acts:
        for x in xs:
            for conv in model.convs:
                x = conv(x).relu()
    expected = []
    for x in xs:
        with capture(model) as one:
            for conv in model.convs:
                x = conv(x).relu()
        expected += [{name: one[name][i] for name in one} for i in range(2)]
    assert len(expected) == 6
    assert_rows(acts.samples(), expected)


def test_a_layer_that_is_called_again_on_its_own_output_is_in_one_pass_or_refused():
    model, x = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 3, padding=1)}), torch.randn(3, 2, 12)
    with torch.no_grad(), capture(model) as acts:
        y = x
        for _ in range(4):
            y = model["conv"](y).relu()
    with pytest.raises(Unsupported, match="'conv' was called by itself.*Call the model or one of its methods once"):
        acts.samples()
    assert len(acts.calls("conv")) == 4


def test_functions_that_repeat_outside_of_the_model_are_refused_by_input():
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 2, 3)})
    with capture(model) as acts:
        for _ in range(2):
            nn.functional.conv1d(torch.randn(1, 1, 9), model["conv"].weight)
    with pytest.raises(Unsupported, match="'conv' ran several times outside of a call of the model"):
        acts.samples()


def test_a_layer_that_runs_twice_in_a_pass_is_numbered_within_it():
    model = nn.Sequential(conv := nn.Conv1d(2, 2, 3, padding=1), nn.ReLU(), conv)
    xs = [torch.randn(2, 2, 9) for _ in range(3)]
    with capture(model) as acts:
        for x in xs:
            model(x)
    samples = acts.samples()
    assert [list(row) for row in samples] == [["0#0", "0#1"]] * 6
    assert list(acts) == [f"0#{i}" for i in range(6)]
    for i, x in enumerate(x for batch in xs for x in batch.split(1)):
        first = conv(x)
        torch.testing.assert_close(samples[i], {"0#0": first[0], "0#1": conv(first.relu())[0]})


def test_a_parameter_replaced_between_two_calls_of_a_method_keeps_its_name():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(2, 1, 3))

        def encode(self, x):
            return nn.functional.conv1d(x, self.kernel)

    model, x = Loose(), torch.randn(1, 1, 9)
    with capture(model, types=nn.Module) as acts:
        model.encode(x)
        model.kernel = nn.Parameter(torch.randn(2, 1, 3))
        model.encode(x)
    assert [call.key for call in acts.calls()] == ["kernel#0", "kernel#1"]


def test_a_function_that_takes_the_model_is_no_method():
    model, xs = Methods(), [torch.randn(1, 1, 20) for _ in range(3)]

    def run(model, batches):
        for x in batches:
            model.encode(x)

    with capture(model) as acts:
        run(model, xs)
    assert_rows(acts.samples(), rows_of(model, xs))


def test_frames_have_no_mark_after_the_capture():
    model = Methods()
    with capture(model) as acts:
        model.second(model.first(torch.randn(1, 1, 9)))
        assert sys._getframe().f_trace is not None
    assert sys._getframe().f_trace is None
    assert len(acts) == 2


def test_a_debugger_goes_on_tracing_a_method_that_is_a_pass():
    model, lines = Methods(), []

    def trace(frame, event, arg):
        if frame.f_code is not Methods.encode.__code__:
            return None
        lines.append(event)
        return trace

    before = sys.gettrace()
    with capture(model) as acts:
        sys.settrace(trace)
        try:
            model.encode(torch.randn(1, 1, 9))
        finally:
            sys.settrace(before)
    assert lines == ["call", "line", "return"]
    assert {call.forward for call in acts.calls()} == {0}


def test_an_unbatched_input_is_one_sample():
    model, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3)), torch.randn(3, 20)
    with capture(model) as acts:
        model(x)
    assert tuple(acts["0"].shape) == (4, 18)
    (sample,) = acts.samples()
    assert torch.equal(sample["1"], model(x))


def test_a_waveform_without_axes_is_one_sample():
    model = AfterConv(lambda t: t)
    model.forward = lambda x: model.conv(x.reshape(1, 2, -1))
    with capture(model) as acts:
        model(torch.randn(40))
    assert tuple(acts.sample(0)["conv"].shape) == (4, 20)


def test_a_sample_out_of_range_says_how_many_there_are():
    model = FiveConvs()
    with capture(model) as acts:
        model(torch.randn(3, 1, 20))
    for i in (3, -4):
        with pytest.raises(OutOfRange, match=f"sample {i} does not exist, since the capture has 3 inputs"):
            acts.sample(i)


def test_rows_that_are_not_the_inputs_are_refused_with_the_layer_and_both_numbers():
    model = AfterConv(lambda t: t)
    model.forward = lambda x: model.conv(x.reshape(-1, 2, 10))
    with capture(model) as acts:
        model(torch.randn(4, 2, 20))
    with pytest.raises(
        Unsupported,
        match=r"the rows of 'conv' with shape \(8, 4, 10\) are not the inputs, since axis 0 is 8 and the input batch is 4",
    ):
        acts.sample(0)


# -- the end of a block


def test_a_body_that_never_ran_the_model_is_not_silent():
    with pytest.raises(
        NotCaptured, match=r"did not run inside the capture. Write: with capture\(model\) as acts: model\(x\)"
    ):
        with capture(FiveConvs()):
            pass


def test_a_layer_asked_for_by_name_that_did_not_run_is_not_silent():
    model = BranchOnData()
    with pytest.raises(
        NotCaptured, match=r"1 layer selected by name did not run: low\. list_layers\(model, example=x\)"
    ):
        with capture(model, ["low", "high"]):
            model(torch.ones(1, 1, 9))


def test_without_strict_the_same_is_a_warning():
    model = BranchOnData()
    with pytest.warns(UserWarning, match="did not run: low"), capture(model, ["low", "high"], strict=False) as acts:
        model(torch.ones(1, 1, 9))
    assert list(acts) == ["high"]


def test_stop_ends_the_pass_once_every_selected_layer_ran():
    model, x = FiveConvs(), torch.randn(1, 1, 20)
    seen = []
    handle = model.convs[3].register_forward_hook(lambda *_: seen.append(3))
    with capture(model, ["convs.0", "convs.2"], stop=True) as acts:
        model(x)
        pytest.fail("the forward pass went on")
    handle.remove()
    assert list(acts) == ["convs.0", "convs.2"]
    assert seen == []
    with capture(model) as every:
        model(x)
    assert torch.equal(acts["convs.2"], every["convs.2"])


def test_stop_passes_through_a_models_own_except_exception():
    model = AfterConv(lambda t: t)

    def forward(x):
        try:
            return model.conv(x)
        except Exception:
            pytest.fail("the model swallowed the end of the pass")

    model.forward = forward
    with capture(model, "conv", stop=True) as acts:
        model(torch.randn(1, 2, 9))
    assert "conv" in acts


def test_stop_of_an_outer_block_goes_through_an_inner_one():
    model, x = FiveConvs(), torch.randn(1, 1, 20)
    reached = False
    with capture(model, "convs.1", stop=True) as outer:
        with capture(model) as inner:
            model(x)
        reached = True
    assert not reached
    assert list(outer) == ["convs.1"]
    assert "convs.2" not in inner


def test_stop_needs_layers():
    with pytest.raises(ValueError, match=r"stop=True needs layers.*capture\(model, 'encoder.conv3', stop=True\)"):
        capture(FiveConvs(), stop=True)


def test_clear_begins_anew():
    model, x = FiveConvs(), torch.randn(2, 1, 20)
    with capture(model, "convs.0") as acts:
        for _ in range(3):
            model(x)
            assert list(acts) == ["convs.0"]
            assert acts.calls()[0].index == 0
            assert len(acts.samples()) == 2
            acts.clear()
    assert len(acts) == 0
    assert acts.coverage["convs.0"].captured == 3
    with pytest.raises(LayerNotFound, match="its outputs were cleared"):
        acts["convs.0"]


def test_a_layer_named_like_a_numbered_call_stays_apart():
    model = nn.Module()
    model.add_module("a", nn.Conv1d(1, 1, 1))
    model.add_module("a#1", nn.Conv1d(1, 1, 1))
    x = torch.randn(1, 1, 5)
    with capture(model) as acts:
        first, second, third = model.a(x), model.a(2 * x), model._modules["a#1"](x)
    assert list(acts) == ["a##0", "a##1", "a#1"]
    assert same([acts["a##0"], acts["a##1"], acts["a#1"]], [first, second, third])


def test_each_direct_call_of_a_layer_is_a_pass_of_its_own_also_for_inputs():
    model = FiveConvs()
    first, second = torch.randn(2, 1, 9), torch.randn(3, 1, 9)
    with capture(model, at="input") as acts:
        model.convs[0](first)
        model.convs[0](second)
    assert [call.forward for call in acts.calls()] == [0, 1]
    assert [len(acts.calls(forward=i)) for i in (0, 1)] == [1, 1]
    assert torch.equal(acts.sample(4)["convs.0"], second[2])


def test_reduce_by_layer_is_the_functions_own_for_each():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 3, 3))
    x = torch.randn(4, 1, 12)
    with torch.no_grad(), capture(model, reduce={"1": lambda t: t.mean(-1)}) as acts:
        y = model(x)
    assert torch.equal(acts["0"], nn.functional.conv1d(x, model[0].weight, model[0].bias))
    assert torch.equal(acts["1"], y.mean(-1))
    rows = list_layers(model, example=x, reduce={"1": lambda t: t.mean(-1)})
    assert [tuple(row.shape) for row in rows] == [(4, 2, 10), (4, 3)]
    with pytest.raises(LayerNotFound, match="reduce has an entry for '7'"):
        capture(model, reduce={"7": torch.abs})
