"""Looking at a model does not change it: every object is the one that it was, with the bits that it had."""

from __future__ import annotations

import copy
import io
import random
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from convtap import capture, compare, extract, list_layers, timeline, top
from convtap._select.model_state import untouched
from convtap._select.restore import Memory
from tests.process import run_python

X = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings(
    "error:.*could not restore it:UserWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:Lazy modules:UserWarning",
)


def own(tensor, seen):
    """Describes the attributes of a tensor, but for the marks of torch's compiler."""
    return [(key, picture(item, seen)) for key, item in vars(tensor).items() if not key.startswith("_dynamo")]


def picture(value, seen=None):
    """Describes an object and what is in it: which objects they are, of which class, with which bits."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, (str, int, float, bool, type(None), type(torch.sum), type)):
        return (id(value),) if id(value) in seen else repr(value)
    seen[id(value)] = value  # alive, so that no other object gets its identity
    found = [id(value), type(value).__name__]
    if isinstance(value, nn.parameter.UninitializedTensorMixin):
        return [*found, "uninitialized"]
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        bits = dense.contiguous().view(-1).view(torch.uint8).tolist() if dense.numel() else []
        found += [tuple(value.shape), bits, value.requires_grad, value.layout is torch.strided and value.stride()]
        return [*found, picture(value.grad, seen) if value.is_leaf else None, own(value, seen)]
    if isinstance(value, np.ndarray):
        return [*found, value.tobytes()]
    if isinstance(value, torch.Generator):
        return [*found, value.get_state().tolist()]
    if isinstance(value, random.Random):
        return [*found, value.getstate()]
    if isinstance(value, np.random.Generator):
        return [*found, repr(value.bit_generator.state)]
    if isinstance(value, dict):
        found += [[(key, picture(item, seen)) for key, item in value.items()]]
    elif isinstance(value, (list, tuple, deque)):
        found += [[picture(item, seen) for item in value]]
    elif isinstance(value, (set, frozenset)):
        found += [sorted(map(repr, value))]
    if hasattr(value, "__dict__"):
        found += [[(key, picture(item, seen)) for key, item in sorted(vars(value).items())]]
    for slot in getattr(type(value), "__slots__", ()):
        found += [picture(getattr(value, slot, None), seen)]
    return found


@dataclass
class Streaming:
    previous: torch.Tensor
    frames: int = 0
    parts: list = field(default_factory=list)


class Slotted:
    __slots__ = ("cache", "count")

    def __init__(self):
        self.cache, self.count = torch.zeros(3), 0


class Cached:
    def __init__(self):
        self.keys = [torch.zeros(2), torch.zeros(2)]
        self.by_layer = {"a": torch.zeros(2)}


def appended(m):
    m.history.append(m.cache.clone())


def new_attribute(m):
    m.fresh = torch.ones(3)


def deletes(m):
    if hasattr(m, "cache"):
        del m.cache


def grown(m):
    m.state.parts.append(m.state.previous.clone())
    m.state.previous = m.state.previous + 1
    m.state.frames += 1


def slot(m):
    m.state.cache, m.state.count = m.state.cache + 1, m.state.count + 1


def object_of_ones_own(m):
    m.state.keys[1] = torch.cat([m.state.keys[1], torch.ones(1)])
    m.state.keys[0].add_(1)
    m.state.by_layer["b"] = torch.ones(1)
    m.state.by_layer.pop("a", None)


def backward(m):
    with torch.enable_grad():
        (m.conv.weight * 2).sum().backward()


def lazily_made(m):
    m.extra = nn.Conv1d(1, 1, 1)
    m.conv.register_buffer("made", torch.ones(2))


def parametrized(m):
    if not parametrize.is_parametrized(m.conv):
        parametrize.register_parametrization(m.conv, "weight", nn.Identity())


def normalized(m):
    nn.functional.batch_norm(torch.randn(4, 3), m.norm.running_mean, m.norm.running_var, training=True)
    m.norm.num_batches_tracked += 1


def reordered(m):
    m.mapping.move_to_end("a")


def resized(m):
    m.cache.resize_(7).fill_(1)


def set_elsewhere(m):
    m.cache.data = torch.ones(5)


def through_numpy(m):
    m.cache.numpy()[...] = 4


def view_kept(m):
    m.window[1:].add_(1)


def draws(m):
    torch.rand(1, generator=m.generator), m.python.random(), m.numpy.random()


def attribute_of_a_parameter(m):
    m.conv.weight.scale = m.conv.weight.scale + 1
    m.conv.weight.scales.append(1)
    m.conv.bias.fresh = 1


def swaps_modules(m):
    m.layers[0] = nn.Conv1d(1, 1, 1)
    m.plain_list[0].bias.data.add_(1)


CHANGES = {  # what the model has at the beginning, and what its forward does
    "buffer in place": (dict, lambda m: m.buffer.add_(1)),
    "buffer replaced": (dict, lambda m: setattr(m, "buffer", m.buffer + 1)),
    "buffer through data": (dict, lambda m: m.buffer.data.add_(2)),
    "buffer that was None": (dict, lambda m: setattr(m, "empty", torch.ones(2))),
    "tensor replaced": (dict, lambda m: setattr(m, "cache", torch.cat([m.cache, torch.ones(1)]))),
    "tensor in place": (dict, lambda m: m.cache.copy_(torch.ones(3))),
    "tensor rolled": (lambda: {"cache": torch.arange(8.0)}, lambda m: m.cache.copy_(m.cache.roll(1))),
    "tensor that gets a NaN": (dict, lambda m: m.cache.fill_(torch.nan)),
    "tensor with a NaN": (lambda: {"cache": torch.tensor([torch.nan, 1])}, lambda m: m.cache[1].add_(1)),
    "tensor through NumPy": (dict, through_numpy),
    "tensor resized": (dict, resized),
    "tensor set elsewhere": (dict, set_elsewhere),
    "view": (lambda: {"window": torch.zeros(9)[2:6]}, view_kept),
    "expanded tensor": (lambda: {"cache": torch.zeros(1).expand(4)}, lambda m: m.cache[:1].add_(1)),
    "transposed tensor": (lambda: {"cache": torch.zeros(2, 3).T}, lambda m: m.cache.add_(1)),
    "complex tensor": (lambda: {"cache": torch.zeros(2, dtype=torch.complex64)}, lambda m: m.cache.add_(1j)),
    "sparse tensor": (lambda: {"cache": torch.eye(3).to_sparse()}, lambda m: m.cache.mul_(2)),
    "inference tensor": (lambda: {"cache": inference()}, lambda m: in_inference(m.cache)),
    "tensor deleted": (dict, deletes),
    "None that becomes a tensor": (lambda: {"last": None}, lambda m: setattr(m, "last", torch.ones(2))),
    "new attribute": (dict, new_attribute),
    "counter": (lambda: {"calls": 10**9}, lambda m: setattr(m, "calls", m.calls + 1)),
    "list": (lambda: {"history": []}, appended),
    "deque": (lambda: {"history": deque([torch.zeros(1), torch.zeros(1)], 2)}, appended),
    "dict": (lambda: {"kv": {"k": torch.zeros(2)}}, lambda m: m.kv.update(k=m.kv["k"] + 1, v=torch.ones(1))),
    "defaultdict": (lambda: {"kv": defaultdict(list)}, lambda m: m.kv["a"].append(torch.ones(1))),
    "OrderedDict in another order": (lambda: {"mapping": OrderedDict(a=1, b=2)}, reordered),
    "UserDict": (lambda: {"kv": UserDict(k=torch.zeros(2))}, lambda m: m.kv.update(k=m.kv["k"] + 1)),
    "set": (lambda: {"lengths": {5}}, lambda m: m.lengths.add(20)),
    "tuple of tensors": (lambda: {"lstm": (torch.zeros(2), torch.zeros(2))}, lambda m: m.lstm[1].add_(1)),
    "nested containers": (lambda: {"deep": [{"a": (deque([torch.zeros(2)]),)}]}, lambda m: m.deep[0]["a"][0].append(1)),
    "dataclass": (lambda: {"state": Streaming(torch.zeros(2))}, grown),
    "namespace": (lambda: {"state": SimpleNamespace(parts=[], previous=torch.zeros(2), frames=0)}, grown),
    "object with slots": (lambda: {"state": Slotted()}, slot),
    "object": (lambda: {"state": Cached()}, object_of_ones_own),
    "array": (lambda: {"array": np.zeros(3)}, lambda m: m.array.__iadd__(1)),
    "generators": (
        lambda: {"generator": torch.Generator(), "python": random.Random(0), "numpy": np.random.default_rng(0)},
        draws,
    ),
    "running statistics": (lambda: {"norm": nn.BatchNorm1d(3)}, normalized),
    "observer": (
        lambda: {"observer": torch.ao.quantization.MinMaxObserver()},
        lambda m: m.observer(torch.randn(5)),
    ),
    "module made at the first call": (dict, lazily_made),
    "modules replaced": (
        lambda: {"layers": nn.ModuleList([nn.Identity()]), "plain_list": [nn.Conv1d(1, 1, 1)]},
        swaps_modules,
    ),
    "mode": (dict, lambda m: m.conv.train(not m.conv.training)),
    "hook": (dict, lambda m: m.conv.register_forward_hook(lambda *args: None)),
    "requires_grad": (dict, lambda m: m.conv.weight.requires_grad_(False)),
    "gradient": (dict, backward),
    "parameter in place": (dict, lambda m: m.conv.weight.mul_(0.5)),
    "parameter through data": (dict, lambda m: m.conv.weight.data.clamp_(0, 0.1)),
    "data of a parameter replaced": (dict, lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 2)),
    "parameter replaced": (dict, lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight * 2))),
    "attribute of a parameter": (dict, attribute_of_a_parameter),
    "parametrization": (dict, parametrized),
}


def inference():
    with torch.inference_mode():
        return torch.zeros(3)


def in_inference(tensor):
    with torch.inference_mode():
        tensor.add_(1)


class Changing(nn.Module):
    """Does something to itself in each forward pass."""

    def __init__(self, kind):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.conv.weight.scale, self.conv.weight.scales = torch.zeros(1), []
        self.register_buffer("buffer", torch.zeros(3))
        self.register_buffer("empty", None)
        self.cache = torch.zeros(3)
        start, self.kind = CHANGES[kind][0], kind
        for name, value in start().items():
            setattr(self, name, value)

    def forward(self, x):
        y = self.conv(x)
        CHANGES[self.kind][1](self)
        return y


RUNS = {
    "list_layers": lambda model: list_layers(model, example=X),
    "timeline": lambda model: timeline(model, X),
    "top": lambda model: top(model, [X, X], "conv", 1),
    "compare": lambda model: compare(model, nn.Sequential(OrderedDict(conv=nn.Conv1d(1, 2, 3))), example=X),
    "compare, as b": lambda model: compare(nn.Sequential(OrderedDict(conv=nn.Conv1d(1, 2, 3))), model, example=X),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_is_bit_for_bit_and_object_for_object_what_it_was(kind, run):
    model, alive = Changing(kind), {}
    before = picture(model, alive)
    RUNS[run](model)
    assert picture(model) == before


@pytest.mark.parametrize("kind", CHANGES)
def test_these_models_do_change_when_they_run(kind):
    model, alive = Changing(kind), {}
    before = picture(model, alive)
    with torch.no_grad():
        model(X)
    assert picture(model) != before


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("training", [True, False])
def test_each_module_keeps_its_own_mode(run, training):
    model = Changing("counter").train(training)
    model.conv.train(not training)
    RUNS[run](model)
    assert (model.training, model.conv.training) == (training, not training)


class Running(nn.Module):
    """A causal convolution that keeps the end of what it was given, as streaming models do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 5)
        self.register_buffer("context", torch.zeros(1, 1, 4))

    def forward(self, x):
        x = torch.cat([self.context.expand(len(x), 1, 4), x], -1)
        self.context = x[:1, :, -4:].clone()
        return self.conv(x)


def test_a_stream_goes_on_after_a_look_as_if_there_had_been_none():
    model, chunks = Running().eval(), torch.randn(3, 1, 1, 10).unbind()
    alone = copy.deepcopy(model)
    with torch.no_grad():
        expected = [alone(chunk) for chunk in chunks]
        found = []
        for chunk in chunks:
            for run in (
                lambda: list_layers(model, example=X),
                lambda: timeline(model, X),
                lambda: top(model, X, "conv", 1),
            ):
                run()
            compare(model, copy.deepcopy(model), example=X)
            found.append(model(chunk))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_two_streaming_models_are_compared_from_the_same_state():
    a = Running()
    with torch.no_grad():
        a(X)
    b = copy.deepcopy(a)
    assert all(row.max_abs == 0 for row in compare(a, b, example=X))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lengths_of_an_extraction_are_asked_without_moving_the_stream_on(tmp_path):
    a, b = Running().eval(), None
    b = copy.deepcopy(a)
    extract(a, [X], tmp_path / "a", lengths=lambda batch: [20, 20], progress=False)
    extract(b, [X], tmp_path / "b", progress=False)
    assert torch.equal(a.context, b.context)


class Stumbling(Changing):
    def forward(self, x):
        super().forward(x)
        raise RuntimeError("no more")


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "kind", ["buffer in place", "tensor replaced", "list", "counter", "module made at the first call"]
)
def test_a_model_that_fails_is_put_back_too(kind, run):
    model, alive = Stumbling(kind).train(), {}
    before = picture(model, alive)
    with pytest.raises(RuntimeError, match="no more"):
        RUNS[run](model)
    assert picture(model) == before


def test_a_lazy_model_is_lazy_again():
    model = nn.Sequential(OrderedDict(conv=nn.LazyConv1d(2, 3), norm=nn.LazyBatchNorm1d()))
    for run in RUNS.values():
        alive = {}
        before = picture(model, alive)
        run(model)
        assert picture(model) == before
        assert type(model.conv) is nn.LazyConv1d
    with torch.no_grad():
        assert model(X).shape == (2, 2, 18)  # and can still be materialized


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.register_buffer("buffer", torch.zeros(2))
        self.cache = torch.zeros(3)
        self.calls = 0
        self.history = [torch.zeros(1)]

    def forward(self, x):
        self.buffer += 1
        self.cache = self.cache + 1
        self.calls += 1
        self.history.append(x)
        return self.conv(x)


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("run", ["list_layers", "timeline", "top"])
def test_a_scripted_model_is_what_it_was(run, reloaded):
    model = torch.jit.script(Scripted())
    if reloaded:
        file = io.BytesIO()
        torch.jit.save(model, file)
        file.seek(0)
        model = torch.jit.load(file)
    cache, buffer = model.cache, model.buffer
    RUNS[run](model)
    assert (model.cache is cache, model.buffer is buffer, model.training) == (True, True, True)
    assert (cache.tolist(), buffer.tolist(), model.calls, len(model.history)) == ([0, 0, 0], [0, 0], 0, 1)


def test_an_old_weight_norm_gets_its_computed_weight_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(OrderedDict(conv=nn.utils.weight_norm(nn.Conv1d(1, 2, 3))))
    weight = model.conv.weight
    for run in RUNS.values():
        run(model)
        assert model.conv.weight is weight


def test_a_compiled_side_is_what_it_was():
    model, alive = Changing("buffer in place"), {}
    compiled = torch.compile(model, backend="eager")
    before = picture(model, alive)
    compare(model, compiled, example=X)
    assert picture(model) == before


def test_a_model_that_writes_into_its_weights_when_its_mode_changes_gets_them_back():
    class Merging(Changing):
        merged = False

        def train(self, mode=True):
            if self.merged == mode:
                self.merged = not mode
                self.conv.weight.data.add_(-0.3 if mode else 0.3)
            return super().train(mode)

    model, alive = Merging("counter"), {}
    before = picture(model, alive)
    for run in RUNS.values():
        run(model)
        assert picture(model) == before


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("run", RUNS)
def test_a_parameter_that_is_too_large_to_copy_is_named_if_it_was_written(run, monkeypatch):
    monkeypatch.setattr("convtap._select.model_state.PARAMETERS", 8)
    with pytest.warns(UserWarning, match=r"changed conv\.weight \(24 B, too large to copy\) of the Changing.*deepcopy"):
        RUNS[run](Changing("parameter through data"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RUNS[run](Changing("buffer in place"))


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_cache_that_is_too_large_to_copy_is_named_if_it_was_written(monkeypatch):
    monkeypatch.setattr("convtap._select.model_state.OTHERS", 8)
    model = Changing("object")
    with pytest.warns(UserWarning, match=r"changed state\.keys\[0\] \(8 B, too large to copy\)"):
        monkeypatch.setattr("convtap._select.model_state.OTHERS", 4)
        list_layers(model, example=X)


def test_large_parameters_are_not_copied():
    copied = []

    class Counted(Memory):
        def note(self, budgets):
            super().note(budgets)
            copied.append(0 if self._copy is None else self._copy.nbytes)

    model = nn.Sequential(nn.Conv1d(512, 1024, 16), nn.Conv1d(1, 2, 3))  # 32 MiB, and a few bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convtap._select.model_state.Memory", Counted)
        with untouched(model):
            pass
    assert sum(copied) == 4 * (1024 + 2 * 3 + 2)


@pytest.mark.parametrize("run", ["list_layers", "timeline", "top"])
def test_a_capture_around_a_look_stays_whole(run):
    model = Changing("buffer in place")
    with torch.no_grad(), capture(model) as acts:
        model(X)
        RUNS[run](model)
        y = model(X)
    outputs = [call.output for call in acts.calls("conv")]
    assert torch.equal(outputs[0], y)
    assert torch.equal(outputs[-1], y)
    assert not model.conv._forward_hooks
    assert type(model.conv._parameters) is dict
    assert "_compiled_call_impl" not in vars(model)


def test_what_only_the_caller_changes_in_the_meantime_is_the_callers():
    """An object of the standard library, such as a logger, is not the model's, though the model has it."""
    import logging

    model = Changing("counter")
    model.log = logging.getLogger("convtap.test")
    model.log.mark = 1

    class Marks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.log = model.conv, model.log

        def forward(self, x):
            self.log.mark = 2
            return self.conv(x)

    list_layers(Marks(), example=X)
    assert model.log.mark == 2


SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from convtap import compare, list_layers

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.randn(2, 4, 20)

def trained(look):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        if look:
            list_layers(model, example=x)
            compare(model, model, example=x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.full_tensor() for parameter in model.parameters()]

print(all(map(torch.equal, trained(False), trained(True))))
"""


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="torch 2.6: torch.cpu.Stream has no record_event, without which a fully_shard model does not run on the CPU",
)
def test_a_sharded_model_trains_on_after_a_look_as_if_there_had_been_none():
    assert run_python(SHARDED).stdout.splitlines()[-1:] == ["True"]
