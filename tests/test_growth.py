"""Growth: work is counted, not timed. What is read again and again must not be searched for from the start each time."""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import AmbiguousCall, Unsupported, capture, list_layers, tapped
from convtap._capture.traced_functions import Kernel
from convtap._result import call as call_module
from convtap._result import runs as runs_module
from convtap._result.activations import Activations
from convtap._result.call import Call, LayerRecord
from convtap._result.log import Log
from convtap._select.module_tree import ModuleTree
from convtap._torch.frame_search import FrameSearch

X = torch.zeros(1, 1, 4)


def chain(count):
    return nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(count))).eval()


@contextmanager
def counted(owner, name, size=lambda *args: 1):
    """Counts the calls of a function, or what they are given."""
    original, found = getattr(owner, name), Counter()

    def counting(*args, **kwargs):
        found["all"] += size(*args)
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    try:
        yield found
    finally:
        setattr(owner, name, original)


def keys_by_hand(names):
    """The keys of calls, from the names of the layers that ran."""
    times, numbers = Counter(names), Counter()
    keys = []
    for name in names:
        keys.append(name if times[name] == 1 else f"{name}#{numbers[name]}")
        numbers[name] += 1
    return keys


# -- reading while the capture goes on


@pytest.mark.parametrize("calls", [100, 400])
def test_a_read_after_each_call_makes_as_many_keys_however_many_calls_there_are(calls):
    model = chain(1)
    with torch.no_grad(), capture(model, keep="all") as acts, counted(call_module, "numbered") as keys:
        for number in range(calls):
            model(X)
            assert acts[f"0#{number}" if number else "0"] is acts.calls("0")[-1].output
    assert keys["all"] == 0  # a key is found by its layer and number


def test_each_call_is_added_to_the_lists_of_its_layer_once(monkeypatch):
    added = []
    original = runs_module.append_runs
    monkeypatch.setattr(runs_module, "append_runs", lambda lists, new: original(lists, _noted(new, added)))
    model = chain(3)
    with torch.no_grad(), capture(model, keep="all") as acts:
        for number in range(20):
            model(X)
            for layer in ("0", "1", "2"):
                acts[f"{layer}#{number}" if number else layer]
            len(list(acts)), acts.get("nothing"), "1" in acts
    assert len(added) == 60
    assert len({id(call) for call in added}) == 60


def _noted(calls, found):
    for call in calls:
        found.append(call)
        yield call


def test_keys_read_at_any_moment_are_those_of_all_calls_so_far():
    model, draw, ran = chain(4), torch.Generator().manual_seed(0), []
    with torch.no_grad(), capture(model, keep="all", strict=False) as acts:
        for step in torch.randint(0, 12, (150,), generator=draw).tolist():
            if step < 4:
                model[step](X)
                ran.append(str(step))
            elif step == 4:
                acts.clear()
                ran.clear()
            elif step < 8:
                keys = keys_by_hand(ran)
                assert list(acts) == keys
                assert [call.key for call in acts.calls()] == keys
            else:
                for key, call in zip(keys_by_hand(ran), acts.calls(), strict=True):
                    assert acts[key] is call.output
    later = acts.rename({"0": "first"}).join(acts)
    renamed = ["first" if name == "0" else name for name in ran]
    assert list(later) == keys_by_hand(renamed + ran)
    for name in {*ran}:
        assert len(acts.calls(name)) == ran.count(name)


def test_a_plain_name_is_ambiguous_as_soon_as_the_layer_has_run_again():
    model = chain(1)
    with torch.no_grad(), capture(model, keep="all") as acts:
        model(X)
        first = acts["0"]
        model(X)
        with pytest.raises(AmbiguousCall, match="ran 2 times"):
            acts["0"]
        assert acts["0#0"] is first
        assert "0#2" not in acts
        assert "0#01" not in acts


class Numbered(nn.Module):
    """Names that look like numbered keys."""

    def __init__(self):
        super().__init__()
        for name in ("a", "a#0", "b#", "c#1"):
            self.add_module(name, nn.Conv1d(1, 1, 1))

    def forward(self, x):
        return [layer(x) for layer in self.children() for _ in range(2)]


def test_names_with_number_signs_and_the_numbers_of_calls_are_told_apart():
    model = Numbered()
    with torch.no_grad(), capture(model, keep="all") as acts:
        model(X)
    assert list(acts) == ["a##0", "a##1", "a#0#0", "a#0#1", "b##0", "b##1", "c#1#0", "c#1#1"]
    for key, call in zip(list(acts), acts.calls(), strict=True):
        assert acts[key] is call.output


@pytest.mark.parametrize("keep", ["all", "last"])
def test_an_output_that_was_read_is_freed_when_the_capture_forgets_it(keep):
    model = chain(2)
    with torch.no_grad(), capture(model, keep=keep) as acts:
        model(X)
        list(acts), acts.calls("1"), str(acts), acts.coverage
        outputs = [weakref.ref(acts[name]) for name in ("0", "1")]
        if keep == "all":
            acts.clear()
        model(X)
        assert [output() for output in outputs] == [None, None]


def test_an_output_is_freed_by_clear_after_the_capture_and_its_samples_are_gone():
    model = chain(2)
    with torch.no_grad(), capture(model) as acts:
        model(X)
    output = weakref.ref(acts["0"])
    acts.sample(0), acts.samples(), acts.calls(forward=0)
    acts.clear()
    assert output() is None
    assert (acts.samples(), acts.calls(forward=0), len(acts)) == ([], [], 0)


def test_calls_that_took_one_number_in_two_threads_are_numbered_when_they_are_read():
    record = LayerRecord("conv", True)
    record.held = record.captured = 3
    calls = {serial: Call(record, index, 0, "module", X + serial) for serial, index in ((1, 0), (3, 1), (2, 1))}
    acts = Activations(Log(calls=calls, records={"conv": record}))
    assert list(acts) == ["conv#0", "conv#1", "conv#2"]
    assert float(acts["conv#2"].flatten()[0]) == 2


def test_keys_are_read_in_one_thread_while_another_one_appends():
    model, failures, ended = chain(2), [], threading.Event()
    with torch.no_grad(), capture(model, keep="all") as acts:
        model(X)

        def read():
            while not ended.is_set():
                try:
                    assert acts["0#0" if len(acts.calls("0")) > 1 else "0"] is not None
                except (RuntimeError, AssertionError) as error:
                    failures.append(error)
                except AmbiguousCall:
                    pass  # it ran between the two reads

        reader = threading.Thread(target=contextvars.copy_context().run, args=(read,))
        reader.start()
        for _ in range(300):
            model(X)
        ended.set()
        reader.join()
    assert not failures
    assert list(acts) == keys_by_hand(["0", "1"] * 301)


# -- views of very many calls


def test_printing_many_calls_makes_the_keys_of_the_shown_rows_only():
    record = LayerRecord("conv", True)
    count = record.held = record.captured = 10_001
    acts = Activations(Log(calls={i: Call(record, i, i, "module", X) for i in range(count)}, records={"conv": record}))
    with counted(call_module, "numbered") as keys:
        text = str(acts)
    assert keys["all"] == 100
    assert len(text.splitlines()) == 105
    assert "100 of 10,001 rows shown: print(acts.summary(rows=None)) shows all" in text
    assert "10001 calls, 156.3 KiB of values (acts.nbytes counts shared memory once)" in text
    assert acts.nbytes == X.nbytes
    assert acts._repr_html_().count("<tr>") == 103
    assert len(acts.summary(rows=None)) == count


def test_samples_one_by_one_group_the_calls_once():
    model = chain(1)
    with torch.no_grad(), capture(model, keep="all") as acts:
        for number in range(30):
            model(torch.full((2, 1, 4), float(number)))
    expected = acts.samples()
    original = Log.by_pass
    with counted(Log, "by_pass") as groups:
        found = [acts.sample(i) for i in range(60)]
    assert groups["all"] <= 1
    assert Log.by_pass is original
    assert all(torch.equal(a["0"], b["0"]) for a, b in zip(found, expected, strict=True))


def test_the_coverage_of_each_layer_is_found_without_a_look_at_all_of_them_each_time():
    model = chain(20)
    with torch.no_grad(), capture(model) as acts:
        model(X)
    with counted(Log, "state") as states:
        assert {acts.coverage[name].captured for name in acts} == {1}
    assert states["all"] == 20


# -- many layers


class Idle(nn.Module):
    """Layers of which only the first runs."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(1, 1, 1) for _ in range(count))

    def forward(self, x):
        return self.layers[0](x)


def test_list_layers_with_an_example_looks_at_the_state_of_a_layer_a_fixed_number_of_times():
    counts = []
    for layers in (10, 40):
        with counted(Log, "state") as states:
            assert [row.used for row in list_layers(Idle(layers), example=X)].count("idle") == layers - 1
        counts.append(states["all"] / layers)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [chain, lambda count: WeightsOfFunctions(count)])
def test_tapped_looks_at_each_kernel_a_fixed_number_of_times(kind):
    counts = []
    for layers in (10, 40):
        model = kind(layers)
        with counted(Kernel, "tensor") as looks, torch.no_grad():
            _, found = tapped(model)(X)
        assert len(found) == layers
        counts.append(looks["all"] / layers)
    assert counts[0] == counts[1]


class WeightsOfFunctions(nn.Module):
    """Convolutions that are called as functions."""

    def __init__(self, count):
        super().__init__()
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(1, 1, 1)) for _ in range(count))

    def forward(self, x):
        for kernel in self.kernels:
            x = F.conv1d(x, kernel)
        return x


def test_a_kernel_that_is_exchanged_in_the_middle_of_a_forward_keeps_its_name():
    class Exchanged(WeightsOfFunctions):
        def forward(self, x):
            x = F.conv1d(x, self.kernels[0])
            self.kernels[1] = nn.Parameter(torch.ones(1, 1, 1))
            return F.conv1d(x, self.kernels[1])

    with torch.no_grad():
        output, found = tapped(Exchanged(2))(X + 1)
    assert list(found) == ["kernels.0", "kernels.1"]
    assert torch.equal(found["kernels.1"], output)


def test_a_selection_by_many_names_lists_the_parameters_once():
    model = chain(30)
    with counted(ModuleTree, "parameters") as listings:
        assert len(list_layers(model, [str(i) for i in range(30)])) == 30
        assert len(list_layers(model, [f"{i}*" for i in range(30)])) == 30
    assert listings["all"] == 2


# -- deep stacks


def at_depth(depth, run):
    return run() if depth == 0 else at_depth(depth - 1, run)


def walked(wanted):
    """Which of some code objects are on the stack, innermost first, found by a plain walk."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code in wanted:
            found.append(frame)
        frame = frame.f_back
    return found


def test_a_search_of_a_long_stack_looks_at_new_frames_only_and_finds_what_a_walk_finds():
    wanted = [
        test_a_search_of_a_long_stack_looks_at_new_frames_only_and_finds_what_a_walk_finds.__code__,
        inner.__code__,
    ]
    search = FrameSearch({id(code): code for code in wanted})
    totals = []

    def search_here():
        before = search.steps
        assert list(search.frames(sys._getframe())) == walked(wanted)
        totals.append(search.steps - before)

    def loop():
        for depth in (0, 3, 40, 3, 0, 90, 3):
            inner(lambda depth=depth: at_depth(depth, search_here))

    at_depth(300, loop)
    assert totals[0] > 300
    assert all(steps <= 2 * (depth + 8) + 32 for steps, depth in zip(totals[1:], (3, 40, 3, 0, 90, 3), strict=True))
    search.forget()


def inner(run):
    return run()


def test_a_generator_that_another_function_resumes_is_searched_anew():
    search = FrameSearch({id(function.__code__): function.__code__ for function in (one, other)})
    names = []

    def generator():
        for turn in range(80):  # at some depth the generator's own frame is one that a mark would be put on
            at_depth(turn // 2, lambda: names.extend(frame.f_code.co_name for frame in search.frames(sys._getframe())))
            yield

    running = generator()
    for _ in range(40):
        one(running)
        other(running)
    search.forget()
    assert names == ["one", "other"] * 40


def one(generator):
    next(generator)


def other(generator):
    next(generator)


class Methods(nn.Module):
    """A function call in ``forward``, one in another method, and a layer in a third."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(1, 1, 1))
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        return F.conv1d(x, self.kernel)

    def encode(self, x):
        return F.conv1d(x, self.kernel * 2)

    def embed(self, x):
        return self.conv(F.conv1d(x, self.conv.weight))


def test_calls_under_a_long_stack_have_the_names_and_passes_of_those_under_a_short_one():
    model = Methods().eval()

    def described():
        with torch.no_grad(), capture(model, keep="all") as acts:
            for _ in range(3):
                model(X), model.encode(X), model.embed(X), model.conv(X)
        return [(call.key, call.forward, call.via) for call in acts.calls()]

    expected = described()
    assert {forward for _, forward, _ in expected} == set(range(12))
    assert at_depth(300, described) == expected


def test_no_mark_stays_on_a_long_stack_after_the_capture():
    def marks():
        frame, found = sys._getframe(1), []
        while frame is not None:
            if type(frame.f_trace).__name__ == "_Mark":
                found.append(frame.f_code.co_name)
            frame = frame.f_back
        return found

    def run():
        model = Methods().eval()
        with torch.no_grad(), capture(model) as acts:
            model.encode(X)
            assert marks()
        assert acts.calls()
        return marks()

    assert at_depth(200, run) == []


def test_a_refused_sample_is_refused_each_time():
    model = Methods().eval()
    with torch.no_grad(), capture(model, keep="all") as acts:
        for _ in range(2):
            F.conv1d(X, model.kernel), model.conv(X), model.conv(X)
    for _ in range(2):
        with pytest.raises(Unsupported):
            acts.sample(0)
