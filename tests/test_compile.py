"""torch.compile: compiled models run compiled inside a capture, and the process is afterwards what it was."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch._dynamo import eval_frame

from convtap import CoverageWarning, NotCaptured, Unsupported, capture, list_layers
from convtap._taps import convolutions
from tests.models import FiveConvs
from tests.process import run_python
from tests.reference import cloning_hooks, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo's
]
X = torch.randn(2, 1, 30)
NAMES = [f"convs.{i}" for i in range(5)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    assert eval_frame._stance.stance == "default"
    torch._dynamo.reset()


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def submodule(model):
    model.convs[1] = torch.compile(model.convs[1], backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WAYS = [wrapped, in_place, submodule, forward]


@pytest.mark.parametrize("ran_before", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiled_before_the_capture_is_captured_compiled_under_its_own_names(way, ran_before):
    model = FiveConvs(inplace=True)
    with cloning_hooks(model) as expected:
        model(X)
    compiled = way(model)
    if ran_before:
        compiled(X)
        compiled(X)
    with capture(compiled) as acts:
        compiled(X)
    assert list(acts) == NAMES
    assert same(list(acts.values()), [value for _, value in expected])
    assert "the compiled model ran compiled" in str(acts)
    parts = ["convs.1"] if way is submodule else NAMES
    assert [call.name for call in acts.calls() if call.via == "compiled"] == parts
    compiled(X)


@pytest.mark.parametrize("way", WAYS)
def test_two_forward_passes_of_a_compiled_model_are_two_passes(way):
    compiled = way(FiveConvs())
    with capture(compiled) as acts:
        compiled(X)
        compiled(X + 1)
    assert [call.forward for call in acts.calls()] == [0] * 5 + [1] * 5
    assert len(acts.samples()) == 4


class Counted:
    """The graphs that Dynamo makes."""

    def __init__(self) -> None:
        torch._dynamo.utils.counters.clear()

    @property
    def graphs(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("first", ["before", "inside"])
def test_no_graph_is_made_for_a_capture_and_the_values_are_those_of_the_graph(backend, train, first):
    model = FiveConvs(inplace=True).train(train)
    with cloning_hooks(model) as expected:
        plain = model(X)
    compiled, counted = torch.compile(model, backend=backend), Counted()
    with torch.set_grad_enabled(train):
        if first == "before":
            compiled(X)
            assert counted.graphs == 1
        for _ in range(2):
            with capture(compiled) as acts:
                y = compiled(X)
            if train:
                y.sum().backward()
        compiled(X)
    assert counted.graphs == 1
    assert list(acts) == NAMES
    assert {call.via for call in acts.calls()} == {"compiled"}
    for value, (_, eager) in zip(acts.values(), expected, strict=True):
        torch.testing.assert_close(value, eager)
    torch.testing.assert_close(y, plain)


def test_the_captured_values_are_bit_for_bit_what_the_compiled_graph_computed():
    class Returns(nn.Module):
        """Gives what its layers gave, as a copy that the graph itself makes."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 4, 5), nn.Conv1d(4, 4, 5)

        def forward(self, x):
            a = self.a(x)
            copy = a.clone()
            b = self.b(torch.relu_(a))
            return copy, b.clone(), b.mul_(2)

    compiled = torch.compile(Returns())
    with torch.no_grad():
        compiled(X)
        with capture(compiled) as acts:
            a, b, _ = compiled(X)
    assert torch.equal(acts["a"], a)
    assert torch.equal(acts["b"], b)


def test_graph_breaks_and_functions_inside_a_compiled_model_are_captured():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3)
            self.kernel = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            x = self.b(x)
            torch._dynamo.graph_break()
            return F.conv1d(x, self.kernel)

    model = Breaks()
    x = F.conv1d(X, model.a.weight, model.a.bias)
    expected = [x, F.conv1d(x, model.b.weight, model.b.bias)]
    expected.append(F.conv1d(expected[1], model.kernel))
    compiled, counted = torch.compile(model, backend="eager"), Counted()
    compiled(X)
    graphs = counted.graphs
    with capture(compiled) as acts:
        compiled(X)
    assert list(acts) == ["a", "b", "kernel"]
    assert same(list(acts.values()), [value.detach() for value in expected])
    assert counted.graphs == graphs == 3


def test_an_input_and_a_reduction_of_a_compiled_layer_are_captured_compiled():
    compiled = torch.compile(FiveConvs(), backend="aot_eager")
    compiled(X)
    with capture(compiled, "convs.0", at="input") as inputs, capture(compiled, reduce=lambda t: t.mean(-1)) as means:
        compiled(X)
    assert torch.equal(inputs["convs.0"], X)
    assert means["convs.4"].shape == (2, 8)
    assert inputs.calls()[0].via == means.calls()[0].via == "compiled"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"detach": False}, "detach=False"),
        ({"grads": True}, "grads=True"),
        ({"at": "activation"}, "at='activation'"),
        ({"types": (nn.Conv1d, nn.ReLU)}, "act is not a plain Conv1d"),
        ({"functional": False}, "functional=False"),
    ],
    ids=str,
)
def test_what_the_tap_cannot_do_in_compiled_code_runs_eagerly_and_says_so(options, reason):
    model = FiveConvs()
    with cloning_hooks(model) as expected:
        model(X)
    compiled = wrapped(model)
    compiled(X)
    with capture(compiled, **options) as acts:
        compiled(X)
        assert eval_frame._stance.stance == "force_eager"
    assert f"the compiled model ran eagerly in this capture ({reason})" in str(acts)
    if options.get("at") != "activation":
        assert same([acts[name].detach() for name in NAMES], [value for _, value in expected])


def test_a_layer_that_was_compiled_away_is_named():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.away = nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.used(x) if torch.compiler.is_compiling() else self.away(self.used(x))

    compiled = wrapped(Folds())
    with (
        pytest.warns(CoverageWarning, match="convtap saw no convolution of 1 layer in compiled code: away. .*tapped"),
        capture(compiled) as acts,
    ):
        compiled(X)
    assert list(acts) == ["used"]
    with (
        pytest.raises(NotCaptured, match="no convolution of 1 layer .*: away. .*rewrote"),
        capture(compiled, "away"),
    ):
        compiled(X)


def test_a_convolution_whose_bias_the_compiler_took_out_is_not_taken_for_the_layers_output(monkeypatch):
    def peels(graph, inputs):
        """What inductor does on CUDA: the bias becomes an addition of its own."""

        def run(*args):
            x, weight, bias = (
                next(a for a in args if a.dim() == d and a.shape[-1] == n) for d, n in ((3, 30), (3, 3), (1, 2))
            )
            return [F.conv1d(x, weight) + bias[:, None]]

        return run

    monkeypatch.setattr(convolutions, "_peels_biases", lambda x: True)  # as on CUDA
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    compiled = torch.compile(model, backend=peels)
    assert torch.allclose(compiled(X), model(X))
    with pytest.raises(NotCaptured, match="0: the compiler took its bias out of the convolution"), capture(compiled):
        compiled(X)


def test_a_compiled_call_without_the_bias_of_its_layer_is_captured_as_what_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(1, 4, 3)

        def forward(self, x):
            return self.a(x) + F.conv1d(x, self.a.weight)

    model = Twice()
    compiled = wrapped(model)
    with capture(compiled) as acts:
        compiled(X)
    assert torch.equal(acts["a#0"], F.conv1d(X, model.a.weight, model.a.bias).detach())
    assert torch.equal(acts["a#1"], F.conv1d(X, model.a.weight).detach())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("what", ["model", "in place", "function"])
def test_fullgraph_does_not_matter(what, backend):
    model = FiveConvs()
    run = model
    if what == "model":
        run = torch.compile(model, backend=backend, fullgraph=True)
    elif what == "function":
        run = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
    counted = Counted()
    with torch.no_grad():
        with capture(model) as first:
            run(X)
        graphs = counted.graphs
        run(X)
        with capture(model) as acts:
            run(X)
        run(X)
    assert list(first) == list(acts) == NAMES
    assert counted.graphs == graphs == 1


def test_what_dynamo_runs_eagerly_is_captured_by_the_modules():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(inplace=True))
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with capture(compiled) as acts:
        for i in range(12):  # more shapes than Dynamo compiles
            compiled(torch.randn(2, 1, 20 + i))
    assert [call.shape[-1] for call in acts.calls("0")] == [18 + i for i in range(12)]


def test_a_convolution_that_is_compiled_by_itself_is_captured_once():
    model = FiveConvs()
    model.convs[1].compile(backend="eager")
    with capture(model) as acts:
        model(X)
    assert list(acts) == NAMES


def test_a_part_that_is_compiled_inside_the_capture_is_captured():
    model = FiveConvs()
    with capture(model) as acts:
        model.compile(backend="eager")
        model(X)
    assert list(acts) == NAMES


def test_a_compiled_function_around_the_model_is_captured_with_the_models_names():
    model = FiveConvs()
    step = torch.compile(lambda x: model(x).sum(), backend="eager")
    step(X)
    counted = Counted()
    for _ in range(2):
        with capture(model) as acts:
            step(X)
    step(X)
    assert counted.graphs == 0
    assert list(acts) == NAMES
    assert {call.via for call in acts.calls()} == {"compiled"}
    with cloning_hooks(model) as expected:
        model(X)
    assert same(list(acts.values()), [value for _, value in expected])


@pytest.mark.parametrize("first", ["before", "inside"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_capture_of_the_model_follows_what_runs_through_its_compiled_wrapper(first, backend):
    model = FiveConvs()
    compiled, counted = torch.compile(model, backend=backend), Counted()
    if first == "before":
        compiled(X)
    with torch.no_grad(), capture(model) as acts:
        compiled(X)
        compiled(X + 1)
        model(X)
    compiled(X)
    assert counted.graphs == 2  # one with gradients, one without
    assert [call.forward for call in acts.calls()] == [0] * 5 + [1] * 5 + [2] * 5
    assert [call.via for call in acts.calls()] == ["compiled"] * 10 + ["module"] * 5


def test_another_threads_compiled_model_stays_compiled():
    model, other = FiveConvs(), FiveConvs()
    compiled = wrapped(other)
    compiled(X)
    ran = []
    captured = torch.compile(model, backend="eager")
    with capture(captured):
        captured(X)
        thread = threading.Thread(target=lambda: ran.append((eval_frame._stance.stance, compiled(X))))
        thread.start()
        thread.join()
    assert ran[0][0] == "default"


def test_both_spellings_of_a_compiled_layers_name_resolve():
    compiled = wrapped(FiveConvs())
    with capture(compiled, "_orig_mod.convs.1") as acts:
        compiled(X)
    assert list(acts) == ["convs.1"]
    assert acts["_orig_mod.convs.1"] is acts["convs.1"]


def test_the_compiled_code_is_used_again_after_the_block():
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(FiveConvs(), backend=counter)
    compiled(X)
    compiles, frames = counter.frame_count, counter.op_count
    with capture(compiled):
        compiled(X)
    compiled(X)
    assert (counter.frame_count, counter.op_count) == (compiles, frames)


def test_overlapping_captures_restore_the_stance_when_the_last_one_ends():
    compiled = wrapped(FiveConvs())
    a, b = capture(compiled, functional=False), capture(compiled, functional=False)
    in_a, in_b = a.__enter__(), b.__enter__()
    compiled(X)
    a.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    compiled(X)
    b.__exit__(None, None, None)
    assert (len(in_a), len(in_b)) == (5, 10)


def test_a_stance_that_the_user_set_comes_back():
    with torch.compiler.set_stance("eager_on_recompile"):
        compiled = wrapped(FiveConvs())
        with capture(compiled):
            compiled(X)
        assert eval_frame._stance.stance == "eager_on_recompile"


def test_two_threads_with_blocks_of_their_own():
    compiled, failures = wrapped(FiveConvs()), []
    compiled(X)
    start = threading.Barrier(2)

    def work():
        try:
            start.wait()
            for _ in range(10):
                with capture(compiled) as acts:
                    compiled(X)
                assert list(acts) == NAMES
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_block_in_a_function_that_is_being_compiled_names_tapped():
    model = FiveConvs()

    def function(x):
        with capture(model) as acts:
            y = model(x)
        return y, acts["convs.0"]

    with pytest.raises(Unsupported, match=r"inside a function that is being compiled.*convtap.tapped\(model\)"):
        torch.compile(function, backend="eager")(X)
    with pytest.raises(Exception, match="convtap.tapped") as caught:
        torch.compile(function, backend="eager", fullgraph=True)(X)
    assert type(caught.value).__name__ == "Unsupported"


def test_blocks_leave_the_count_of_references_to_none_as_it_is():
    """torch 2.6 takes one from it whenever it is asked whether a function is being compiled."""
    model = nn.Conv1d(1, 1, 1)

    def blocks(count):
        for _ in range(count):
            with capture(model):
                model(torch.ones(1, 1, 3))
        gc.collect()
        return sys.getrefcount(None)

    blocks(10)
    before = blocks(10)
    assert abs(blocks(1000) - before) < 100


def test_a_function_that_is_refused_many_times_can_still_be_compiled():
    model = nn.Conv1d(1, 1, 1)

    def function(x, inside):
        y = x * 2
        torch._dynamo.graph_break()
        if inside:
            with capture(model):
                model(y)
        return y

    compiled = torch.compile(function, backend="eager")
    x = torch.ones(1, 1, 3)
    for _ in range(100):
        with pytest.raises(Unsupported, match="inside a function that is being compiled"):
            compiled(x, True)
    assert torch.equal(compiled(x, False), x * 2)


def test_dynamo_imported_and_used_inside_a_block_is_no_exception():
    script = """
import sys, torch
from torch import nn
from convtap import capture
model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True))
x = torch.randn(2, 1, 9)
finders = list(sys.meta_path)
with capture(model) as acts:
    assert "torch._dynamo" not in sys.modules
    y = torch.compile(model, backend="eager")(x)
assert list(acts) == ["0"] and torch.equal(acts["0"].relu(), y)
assert [finder for finder in sys.meta_path if finder in finders] == finders
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("convtap")]
from torch._dynamo import eval_frame
assert eval_frame._stance.stance == "default"
with capture(model) as acts:
    model(x)
assert len(acts) == 1 and eval_frame._stance.stance == "default"
print("well")
"""
    done = run_python(script)
    assert "well" in done.stdout, done.stderr


def test_import_hook_leaves_no_trace_when_dynamo_is_never_imported():
    script = """
import sys, torch
from torch import nn
from convtap import capture
model, finders = nn.Conv1d(1, 1, 1), list(sys.meta_path)
for _ in range(3):
    with capture(model):
        model(torch.ones(1, 1, 3))
assert sys.meta_path == finders and "torch._dynamo" not in sys.modules
print("well")
"""
    assert "well" in run_python(script).stdout


def test_a_compiled_function_around_the_block_does_not_matter():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    inner = torch.compile(lambda x: x * 2, backend="eager")
    with capture(model) as acts:
        model(inner(X))
    torch.testing.assert_close(acts["0"], model(X * 2).detach())


def test_list_layers_says_that_a_layer_ran_compiled():
    rows = list_layers(wrapped(FiveConvs()), example=X)
    assert [row.used for row in rows] == ["compiled × 1"] * 5
