"""The tap below Python: what the convolution key sees, what it leaves alone, and what it says when it cannot see."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from convtap import CoverageWarning, NotCaptured, capture, list_layers
from convtap._torch import convolution_key
from tests.process import run_python
from tests.reference import cloning_hooks, same

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's
X = torch.randn(2, 1, 20)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


class TwoLayers(nn.Module):
    """A layer that is called, and a kernel that is used in the way ``use`` says."""

    def __init__(self, use) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(2, 2, 3))
        self.use = use

    def forward(self, x):
        return self.use(self, self.conv(x))


def expected_of(model):
    first = F.conv1d(X, model.conv.weight, model.conv.bias, padding=1)
    return {"conv": first.detach(), "kernel": F.conv1d(first, model.kernel, padding=1).detach()}


def check(model, run=None):
    plain = (run or model)(X)
    with capture(model) as acts:
        y = (run or model)(X)
    assert same(dict(acts), expected_of(model)), list(acts)
    assert torch.equal(y, plain)
    return acts


# -- nothing of torch's is switched on


def test_a_default_capture_puts_no_mode_on_torchs_stacks_and_no_hook_on_a_plain_layer():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    with capture(model) as acts:
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._len_torch_dispatch_stack() == 0
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert convolution_key.is_included()
        model(X)
    assert not convolution_key.is_included()
    assert list(acts) == ["conv", "kernel"]


class Counts(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class CountsOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Counts, CountsOperators])
@pytest.mark.parametrize("inside", [True, False])
def test_a_users_own_mode_sees_what_it_sees_without_a_capture(kind, inside):
    model = TwoLayers(lambda m, x: F.relu_(F.conv1d(x, m.kernel, padding=1)))
    with torch.no_grad():
        with kind() as plain:
            model(X)
        mode = kind()
        if inside:
            with capture(model) as acts, mode:
                model(X)
        else:
            with mode, capture(model) as acts:
                model(X)
    assert [str(func) for func in mode.seen] == [str(func) for func in plain.seen]
    assert same(dict(acts), expected_of(model))


class Encoder(nn.Module):
    """A Conv1d, a loose kernel, and torch's own Transformer, whose fast path hooks and modes would switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, padding):
        x = F.conv1d(self.conv(x), self.kernel, padding=1).transpose(1, 2)
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.attention(x, x, x)[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own, on its fast path
@pytest.mark.parametrize("options", [{}, {"functional": True}, {"detach": False}, {"at": "input"}], ids=str)
def test_a_transformers_fast_path_stays_on_and_its_output_is_bit_identical(options):
    model = Encoder().eval()
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[1, 12:] = True
    with torch.no_grad():
        plain = model(X, padding)
        with capture(model, **options) as acts:
            y = model(X, padding)
    assert torch.equal(y, plain)
    assert list(acts) == ["conv", "kernel"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own, on its fast path
def test_a_transformer_that_is_called_directly_keeps_its_fast_path_as_well():
    model = Encoder().eval()
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[1, 12:] = True
    source = torch.randn(2, 20, 8)
    with torch.no_grad():
        plain = model.encoder(source, src_key_padding_mask=padding)
        with capture(model, "conv") as acts:
            model.conv(X)
            for _ in range(2):
                assert torch.equal(model.encoder(source, src_key_padding_mask=padding), plain)
    assert list(acts) == ["conv"]


# -- what a function mode does not see


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("positive", [True, False])
def test_branches_of_torch_cond_are_captured_under_the_names_of_their_weights(grad, positive):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kernel = nn.Conv1d(1, 2, 3), nn.Parameter(torch.randn(2, 1, 3))

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.conv(x), lambda x: F.conv1d(x, self.kernel), (x,))

    model, x = Branches(), X.abs() if positive else -X.abs()
    with torch.set_grad_enabled(grad):
        plain = model(x)
        for _ in range(2):
            with capture(model) as acts:
                y = model(x)
            assert list(acts) == ["conv" if positive else "kernel"]
            assert torch.equal(acts.calls()[0].output, F.conv1d(x, *_weights(model, positive)).detach())
            assert torch.equal(y, plain)


def _weights(model, positive):
    return (model.conv.weight, model.conv.bias) if positive else (model.kernel,)


def test_a_while_loop_is_captured_call_by_call():
    from torch._higher_order_ops import while_loop

    def loop(model, x):
        return while_loop(
            lambda i, x: i < 3, lambda i, x: (i + 1, F.conv1d(x, model.kernel, padding=1)), (torch.tensor(0), x)
        )[1]

    model = TwoLayers(loop)
    with torch.no_grad(), capture(model) as acts:
        y = model(X)
    hidden = expected_of(model)["conv"]
    for i in range(3):
        hidden = F.conv1d(hidden, model.kernel, padding=1).detach()
        assert torch.equal(acts[f"kernel#{i}"], hidden)
    assert torch.equal(y, hidden)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6: map runs its function on tensors of its own as well (docs/limits.md)",
)
def test_map_is_captured_row_by_row():
    from torch._higher_order_ops.map import map as map_over

    model = TwoLayers(lambda m, x: map_over(lambda row, w: F.conv1d(row, w, padding=1), x, m.kernel))
    with torch.no_grad(), capture(model) as acts:
        y = model(X)
    calls = acts.calls("kernel")
    assert torch.equal(torch.stack([call.output for call in calls]), y)


def test_a_convolution_inside_a_custom_operator_is_captured():
    @torch.library.custom_op("convtap_tests::filtered", mutates_args=())
    def filtered(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, weight, padding=1) + 0

    with torch.no_grad():
        check(TwoLayers(lambda m, x: filtered(x, m.kernel)))


def test_scripted_functions_called_from_python_are_captured_with_a_loose_weight_and_a_layers():
    scripted = torch.jit.script(padded_conv)
    for _ in range(3):  # the executor profiles, then optimizes
        check(TwoLayers(lambda m, x: scripted(x, m.kernel)))
    model = TwoLayers(lambda m, x: scripted(scripted(x, m.kernel), m.other.weight))
    model.other = nn.Conv1d(2, 2, 3)
    with capture(model) as acts:
        y = model(X)
    assert list(acts) == ["conv", "kernel", "other"]
    assert torch.equal(acts["other"], y)


def padded_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.conv1d(x, weight, padding=1)


class Forks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(1, 2, 3) for _ in range(3))

    def forward(self, x):
        future = torch.jit.fork(self.a, x)
        other = torch.jit.fork(self.b, x)
        return self.c(x) + torch.jit.wait(future) + torch.jit.wait(other)


def test_every_branch_that_torchscript_forks_is_captured_in_every_run():
    model = Forks()
    scripted = torch.jit.script(model)
    expected = {name: F.conv1d(X, m.weight, m.bias).detach() for name, m in model.named_children()}
    for _ in range(20):
        with capture(scripted) as acts:
            scripted(X)
        assert same({name: acts[name] for name in sorted(acts)}, expected)
        assert {call.forward for call in acts.calls()} == {0}
    with capture(scripted) as acts:
        for _ in range(100):
            scripted(X)
    assert {name: len(acts.calls(name)) for name in expected} == dict.fromkeys(expected, 100)


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning", "ignore:.*deprecated.*:UserWarning")
def test_quantized_functions_are_captured_as_functions():
    from torch.ao.nn.quantized import functional as quantized

    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    weight = torch.quantize_per_tensor(torch.randn(2, 2, 3), 0.1, 0, torch.qint8)

    def use(model, x):
        q = torch.quantize_per_tensor(x.detach(), 0.1, 64, torch.quint8)
        return quantized.conv1d(q, weight, torch.zeros(2), scale=0.2, zero_point=64).dequantize()

    model = TwoLayers(use)
    with capture(model) as acts:
        y = model(X)
    assert list(acts) == ["conv", "F.conv1d"]
    assert torch.equal(acts["F.conv1d"].dequantize(), y)


def test_autocast_does_not_hide_whose_weight_it_is():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(X)
        with capture(model) as acts:
            y = model(X)
    assert list(acts) == ["conv", "kernel"]
    assert acts["kernel"].dtype is torch.bfloat16
    assert torch.equal(acts["kernel"], y)
    assert torch.equal(y, plain)


def test_fake_tensors_are_named_as_what_they_are():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(X)
        with pytest.raises(NotCaptured, match="ran on fake tensors .*which have shapes but no values"), capture(model):
            model(x)


# -- what goes on around it


def test_what_is_traced_inside_a_capture_is_the_graph_that_is_traced_outside():
    def use(model, x):
        return torch.relu(F.conv1d(x, model.kernel, padding=1))

    model = TwoLayers(use).eval()

    def graph():
        text = re.sub(r"___torch_mangle_\d+\.", "", str(torch.jit.trace(model, X, check_trace=False).inlined_graph))
        return [line.partition(" # ")[0] for line in text.splitlines()]  # without where it was traced

    plain = graph()
    for options in ({}, {"detach": False}, {"at": "input"}, {"reduce": lambda t: t.mean(-1)}):
        with capture(model, **options) as acts:
            traced = graph()
        assert traced == plain, options
        assert list(acts) == ["conv", "kernel"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_exported_inside_a_capture_is_the_models_alone(strict):
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1)).eval()
    plain = torch.export.export(model, (X,), strict=strict)
    with capture(model) as acts:
        model(X)
        program = torch.export.export(model, (X,), strict=strict)
    assert str(program.graph) == str(plain.graph)
    assert list(acts) == ["conv", "kernel"]
    exported = program.module()
    with capture(exported) as acts:
        exported(X)
    assert same(dict(acts), expected_of(model))


def test_a_debuggers_trace_function_and_a_profiler_do_not_matter():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    events = []

    def trace(frame, event, argument):
        events.append(event)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        check(model)
    finally:
        sys.settrace(before)
    assert len(events) > 1000
    sys.setprofile(lambda frame, event, argument: None)
    try:
        check(model)
    finally:
        sys.setprofile(None)


def test_device_contexts_and_default_dtypes_do_not_matter():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    with torch.device("meta"):
        check(model)
    with torch.device("cpu"), capture(model) as acts, torch.device("meta"):
        model(X)
    assert same(dict(acts), expected_of(model))


def test_gradients_of_gradients_are_those_without_a_capture():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1).tanh())
    x = X.clone().requires_grad_()

    def penalty():
        (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), list(model.parameters()))

    plain = penalty()
    for options in ({}, {"detach": False}, {"grads": True}):
        with capture(model, **options):
            assert same(penalty(), plain), options


# -- whose weight it is


def test_memory_that_a_parameter_left_is_not_that_parameters_any_more():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.randn(2, 1, 3))
            self.conv = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            self.k.data = torch.randn(2, 1, 3)  # what it had before is free now
            predicted = [torch.randn(2, 1, 3) for _ in range(4)]  # and may lie there
            return self.conv(sum(F.conv1d(x, w) for w in predicted) + F.conv1d(x, self.k))

    model = Moves()
    for _ in range(20):
        with capture(model) as acts:
            model(X)
        assert [call.name for call in acts.calls()] == ["F.conv1d"] * 4 + ["k", "conv"]


def test_a_kernel_that_is_replaced_within_a_pass_keeps_its_name():
    class Replaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.randn(1, 1, 3))
            self.list = nn.ParameterList([torch.randn(1, 1, 3)])

        def forward(self, x):
            x = F.conv1d(F.conv1d(x, self.k), self.list[0])
            self.k = nn.Parameter(torch.randn(1, 1, 3))
            self.list[0] = nn.Parameter(torch.randn(1, 1, 3))
            return F.conv1d(F.conv1d(x, self.k), self.list[0])

    model = Replaces()
    with capture(model) as acts:
        y = model(X)
    assert [call.key for call in acts.calls()] == ["k#0", "list.0#0", "k#1", "list.0#1"]
    assert torch.equal(acts["list.0#1"], y)


SHARDED = """
import os, socket, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from convtap import capture, list_layers
os.environ.update(MASTER_ADDR="127.0.0.1")
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); os.environ["MASTER_PORT"] = str(s.getsockname()[1])
dist.init_process_group("gloo", rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
torch.manual_seed(0)

class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3) / 4)
    def forward(self, x):
        return F.conv1d(self.conv(x), self.kernel, padding=1)

model = nn.Sequential(*(Unit() for _ in range(6)))
x = torch.randn(2, 4, 16)
expected = {}
with torch.no_grad():
    y = x
    for i, unit in enumerate(model):
        expected[f"{i}.conv"] = unit.conv(y)
        expected[f"{i}.kernel"] = y = unit(y)
for unit in model:
    fully_shard(unit, mesh=mesh)
fully_shard(model, mesh=mesh)
for _ in range(3):
    with capture(model) as acts:
        model(x).sum().backward()
    assert list(acts) == list(expected), list(acts)
    assert all(torch.equal(acts[name], value) for name, value in expected.items())
dist.destroy_process_group()
print("sharded and well")
"""


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="torch 2.6: torch.cpu.Stream has no record_event, without which a fully_shard model does not run on the CPU",
)
def test_equal_sharded_units_each_have_their_own_names():
    done = run_python(SHARDED)
    assert "sharded and well" in done.stdout, done.stderr[-3000:]


FLAT = """
import os, socket, tempfile, warnings, torch, torch.distributed as dist, torch.nn.functional as F
warnings.simplefilter("ignore")
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from convtap import capture, extract, list_layers
os.environ.update(MASTER_ADDR="127.0.0.1")
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); os.environ["MASTER_PORT"] = str(s.getsockname()[1])
dist.init_process_group("gloo", rank=0, world_size=1)
torch.manual_seed(0)
plain = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv1d(2, 2, 3))
x = torch.randn(2, 1, 20)
with torch.no_grad():
    first = plain[0](x)
    expected = [first.clone(), plain[2](first.relu())]
model = FSDP(nn.Sequential(*(FSDP(m, device_id=torch.device("cpu")) if isinstance(m, nn.Conv1d) else m for m in plain)),
             device_id=torch.device("cpu"))
for _ in range(2):
    with capture(model) as acts:
        model(x).sum().backward()
    assert list(acts) == ["0", "2"], list(acts)
    assert all(torch.equal(a, b) for a, b in zip(acts.values(), expected))
assert [(row.name, row.used) for row in list_layers(model, example=x)] == [("0", "module × 1"), ("2", "module × 1")]
with tempfile.TemporaryDirectory() as folder:
    store = extract(model, [x], folder, progress=False)
    assert list(store) == ["0", "2"], list(store)
    assert torch.equal(store["2"][1], expected[1][1])
dist.destroy_process_group()
print("flat and well")
"""


def test_layers_of_a_flat_parameter_are_captured_once_under_their_own_names():
    done = run_python(FLAT)
    assert "flat and well" in done.stdout, done.stderr[-3000:]


# -- modules outside of the tree


class Hides(nn.Module):
    """Convolutions that are no parts of the module."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        if seen:
            self.seen = nn.Conv1d(1, 1, 3, padding=1)
        self.hidden = [nn.Conv1d(1, 1, 3, padding=1)]
        self.by_name = {"a": nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 1, 3, padding=1))}
        object.__setattr__(self, "plain", nn.Conv1d(1, 1, 3, padding=1))
        self.made = None

    def forward(self, x):
        if hasattr(self, "seen"):
            x = self.seen(x)
        x = self.hidden[0](x)
        x = self.by_name["a"](x)
        x = self.plain(x)
        if self.made is None:
            self.made = nn.Conv1d(1, 1, 3, padding=1)
        return self.made(x)


@pytest.mark.parametrize("seen", [True, False])
def test_convolutions_that_are_not_in_the_tree_are_captured_as_functions_or_by_their_new_name(seen):
    model = Hides(seen)
    with capture(model) as acts:
        y = model(X)
    assert [call.name for call in acts.calls()] == ["seen"] * seen + ["F.conv1d"] * 3 + ["made"]
    assert torch.equal(acts["made"], y)
    x = model.seen(X) if seen else X
    for call, layer in zip(acts.calls("F.conv1d"), (model.hidden[0], model.by_name["a"], model.plain), strict=True):
        x = layer(x)
        assert torch.equal(call.output, x.detach())


def test_a_layer_that_is_replaced_inside_the_capture_is_captured_and_said():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
    with (
        pytest.warns(CoverageWarning, match="replaced or removed 1 selected layer: 1"),
        capture(model) as acts,
    ):
        model[1] = nn.Conv1d(1, 1, 3)
        y = model(X)
    assert list(acts) == ["0", "1"]
    assert torch.equal(acts["1"], y)


def test_a_layer_that_is_appended_inside_the_capture_has_its_new_name():
    model = nn.Sequential(nn.Conv1d(1, 1, 3))
    with capture(model) as acts:
        model.append(nn.Conv1d(1, 1, 3))
        y = model(X)
    assert list(acts) == ["0", "1"]
    assert torch.equal(acts["1"], y)


# -- bypasses


def test_a_deep_copy_that_runs_in_forward_is_no_fused_kernel():
    model = TwoLayers(lambda m, x: copy.deepcopy(m.other)(x))
    model.other = nn.Conv1d(2, 2, 3)
    with capture(model) as acts:
        y = model(X)
    assert list(acts) == ["conv", "F.conv1d"]
    assert torch.equal(acts["F.conv1d"], y)
    assert acts.coverage["other"].state == "idle"


def test_a_weight_that_was_read_is_afterwards_a_plain_parameter_and_so_are_its_copies():
    copies = []

    def read(model, x):
        weight = model.other.weight
        copies.append(copy.deepcopy(weight))
        return x * weight.sum()

    model = TwoLayers(read)
    model.other = nn.Conv1d(2, 2, 3)
    with pytest.raises(
        NotCaptured, match=r"other \(bypassed in 1 pass: weight read by torch.Tensor.sum \(test_tap.py:\d+\)\)"
    ):
        with capture(model, ["conv", "other"]):
            y = model(X)
    assert [type(model.other.weight), type(copies[0]), type(y)] == [nn.Parameter, nn.Parameter, torch.Tensor]
    assert type(model.other._parameters) is dict


def test_no_torch_call_that_touches_no_weight_is_looked_at():
    model = TwoLayers(lambda m, x: x * 2)
    with capture(model), CountsOperators() as mode:
        plain = model.conv(X)
        mode.seen.clear()
        plain * 2 + 1
    assert [str(func) for func in mode.seen] == ["aten.mul.Tensor", "aten.add.Tensor"]


def test_what_is_said_about_a_layer_is_the_same_however_it_is_used():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    assert [(row.name, row.used) for row in list_layers(model, example=X)] == [
        ("conv", "module × 1"),
        ("kernel", "F.conv1d × 1"),
    ]
    with cloning_hooks(model) as seen:
        model(X)
    assert same(dict(seen), {"conv": expected_of(model)["conv"]})


# -- what an attack found


class Siamese(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1)
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.right(self.left(x).relu())


@pytest.mark.parametrize("options", [{}, {"detach": False}, {"at": "input"}, {"grads": True}], ids=str)
@pytest.mark.parametrize("layers", [None, "left", "right"])
def test_layers_with_one_weight_are_told_apart(layers, options):
    model = Siamese()
    with cloning_hooks(model) as seen:
        model(X)
    with capture(model, layers, **options) as acts:
        model(X)
    assert list(acts) == ([layers] if layers else ["left", "right"])
    if options.get("at") != "input":
        assert same({name: value.detach() for name, value in acts.items()}, {n: v for n, v in seen if n in acts})


def test_convolutions_in_hooks_for_all_modules_are_captured():
    model = TwoLayers(lambda m, x: x)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, y: F.conv1d(y, model.kernel, padding=1) if module is model.conv else None
    )
    try:
        with capture(model) as acts:
            y = model(X)
    finally:
        hook.remove()
    assert torch.equal(acts["kernel"], y)
    assert list(acts) == ["kernel", "conv"]


def test_a_time_batch_channel_convolution_is_captured():
    class ConvTBC(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 1, 2)), nn.Parameter(torch.randn(2))

        def forward(self, x):
            return torch.conv_tbc(x, self.weight, self.bias, 1)

    model = nn.ModuleDict({"tbc": ConvTBC()})
    with capture(model) as acts:
        y = model["tbc"](X.permute(2, 0, 1).contiguous())
    assert torch.equal(acts["tbc"], y)


def test_a_capture_that_stops_the_pass_takes_nothing_from_the_one_around_it():
    model = TwoLayers(lambda m, x: F.conv1d(x, m.kernel, padding=1))
    with capture(model) as outer, capture(model, "kernel", stop=True) as inner:
        model(X)
    assert list(inner) == ["kernel"]
    assert same(dict(outer), expected_of(model))


def test_a_new_parameter_that_a_forward_makes_of_a_weight_is_a_parameter():
    class Averages(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mean = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x):
            mixed = 0.9 * self.mean.weight.detach() + 0.1 * self.conv.weight.detach()
            self.mean.weight = nn.Parameter(mixed, requires_grad=False)
            self.copy = nn.Parameter(self.conv.weight)
            assert isinstance(self.copy, nn.Parameter)
            return self.mean(self.conv(x))

    model, plain = Averages(), Averages()
    plain.load_state_dict(model.state_dict())
    expected = plain(X)
    with capture(model) as acts:
        y = model(X)
    assert torch.equal(y, expected)
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 5
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert list(acts) == ["conv", "mean"]


def test_files_and_pickles_that_a_forward_writes_do_not_need_convtap():
    written = []

    def write(model, x):
        weight = model.other.weight
        file = io.BytesIO()
        torch.save({"state": model.state_dict(), "weight": weight, "detached": weight.detach()}, file)
        written.append((file.getvalue(), pickle.dumps(weight)))
        return F.conv1d(x, weight)

    model = TwoLayers(write)
    model.other = nn.Conv1d(2, 2, 3)
    with capture(model) as acts:
        model(X)
    assert b"convtap" not in written[0][0] + written[0][1]
    loaded = torch.load(io.BytesIO(written[0][0]), weights_only=True)
    assert torch.equal(loaded["weight"], model.other.weight)
    assert list(acts) == ["conv", "other"]


def test_reads_that_use_no_values_of_a_weight_are_not_a_bypass():
    def use(model, x):
        return x.to(model.other.weight).type_as(model.other.weight) + model.other.bias[:, None]

    model = TwoLayers(use)
    model.other = nn.Conv1d(2, 2, 3)
    with capture(model) as acts:
        y = model(X)
    assert type(y) is torch.Tensor
    assert acts.coverage["other"].state == "idle"


def test_a_weight_that_is_an_operand_of_an_in_place_call_was_read():
    model = TwoLayers(lambda m, x: x.clone().mul_(m.other.weight[:, :, 0]))
    model.other = nn.Conv1d(1, 2, 1)
    with pytest.raises(NotCaptured, match=r"other \(bypassed"), capture(model):
        model(X)
    model = TwoLayers(lambda m, x: x.clone().transpose(0, 1).mul_(m.other.weight))
    model.other = nn.Conv1d(1, 2, 1)
    with (
        pytest.raises(NotCaptured, match=r"other \(bypassed in 1 pass: weight read by torch.Tensor.mul_"),
        capture(model),
    ):
        model(X)


def test_a_weight_that_was_fetched_before_compiled_code_ran_is_followed_after_it():
    inner = torch.compile(nn.Linear(20, 20), backend="eager")

    def use(model, x):
        weight = model.other.weight
        return inner(x) * weight.view(2, 1)

    model = TwoLayers(use)
    model.other = nn.Conv1d(2, 2, 1, groups=2)
    with pytest.raises(NotCaptured, match=r"other \(bypassed"), capture(model):
        model(X)


def test_a_shallow_copy_made_inside_does_not_keep_what_was_captured(no_gc):
    model = TwoLayers(lambda m, x: x)
    with capture(model) as acts:
        other = copy.copy(model.conv)
        model(X)
    log = weakref.ref(acts._log)
    del acts
    assert log() is None
    assert torch.equal(other(X), model.conv(X))


def test_scripting_the_model_inside_a_capture_works_as_outside():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    with capture(model) as acts:
        y = model(X)
        script = torch.jit.script(model)
    assert torch.equal(script(X), y)
    assert list(acts) == ["0"]


@pytest.mark.parametrize("functional", [None, False])
def test_forked_branches_are_captured_whether_functions_are_watched_or_not(functional):
    scripted = torch.jit.script(Forks())
    with capture(scripted, functional=functional) as acts:
        scripted(X)
    assert sorted(acts) == ["a", "b", "c"]


def test_everything_is_freed_after_following_activations(no_gc):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    with capture(model, at="activation") as acts:
        model(X)
    alive = weakref.ref(model), weakref.ref(acts)
    del model, acts
    assert [reference() for reference in alive] == [None, None]
