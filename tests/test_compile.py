"""torch.compile: compiled models run eagerly inside a block, and the process is afterwards what it was."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo import eval_frame

from convtap import Unsupported, capture
from tests.models import FiveConvs
from tests.process import run_python
from tests.reference import cloning_hooks, same

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's
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


@pytest.mark.parametrize("ran_before", [True, False])
@pytest.mark.parametrize("way", [wrapped, in_place, submodule])
def test_a_model_compiled_before_the_block_is_captured_under_its_own_names(way, ran_before):
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
    assert "the compiled model ran eagerly in this block" in str(acts)
    compiled(X)


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


def test_overlapping_blocks_restore_the_stance_when_the_last_one_ends():
    compiled = wrapped(FiveConvs())
    a, b = capture(compiled), capture(compiled)
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
