"""Wrappers, transforms and everything else that a model may run in."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from convtap import ModifiedInPlace, NotCaptured, Unsupported, capture
from tests.models import FiveConvs, FunctionalConvs
from tests.process import run_python
from tests.reference import cloning_hooks, same

X = torch.randn(4, 1, 30)


def values(model, x=X):
    with cloning_hooks(model) as seen:
        model(x)
    return dict(seen)


# -- activation checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = FiveConvs(inplace=True), reentrant
        self.loose = nn.Parameter(torch.randn(8, 8, 3))

    def part(self, x):
        return F.relu_(F.conv1d(self.body(x), self.loose, padding=1))

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recomputation_of_checkpointing_is_not_recorded(reentrant):
    model, x = Checkpointed(reentrant), X.clone().requires_grad_()
    expected = values(model.body)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with capture(model) as acts:
        model(x).sum().backward()
    assert [call.key for call in acts.calls()] == [*(f"body.convs.{i}" for i in range(5)), "loose"]
    assert same([acts[f"body.{name}"] for name in expected], list(expected.values()))
    assert same([p.grad for p in model.parameters()], plain)


def test_checkpointing_without_reentry_keeps_the_captured_tensors_on_the_path():
    model = Checkpointed(False)
    with capture(model, detach=False) as acts:
        loss = model(X).pow(2).sum()
    gradients = torch.autograd.grad(loss, [acts[f"body.convs.{i}"] for i in range(5)], retain_graph=False)
    y, hidden = X, []
    for conv in model.body.convs:
        hidden.append(conv(y))
        y = hidden[-1].clone().relu()
    last = F.conv1d(y, model.loose, padding=1).relu().pow(2).sum()
    assert same(gradients, torch.autograd.grad(last, hidden))


def test_a_backward_alone_in_the_block_says_why_nothing_was_captured():
    model = Checkpointed(False)
    loss = model(X).sum()
    with (
        pytest.raises(NotCaptured, match="only during a backward pass, in which activation checkpointing"),
        capture(model),
    ):
        loss.backward()


# -- torch.func


def test_vmap_gives_the_whole_batch_without_wrappers():
    model = FiveConvs(inplace=False)
    expected = values(model)
    with capture(model) as acts:
        vmap(model)(X)
    assert all(not torch._C._functorch.is_functorch_wrapped_tensor(output) for output in acts.values())
    for name, output in expected.items():
        torch.testing.assert_close(acts[name], output)
    assert len(acts.samples()) == 4


def test_vmap_over_another_axis_and_nested_vmap_put_the_batch_axes_first():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    x = torch.randn(1, 30, 3, 5)
    with capture(model) as acts:
        vmap(vmap(model, in_dims=2), in_dims=2)(x)
    expected = torch.stack([torch.stack([model(x[:, :, a, b]) for b in range(5)]) for a in range(3)])
    torch.testing.assert_close(acts["0"], expected.detach())
    assert tuple(acts["0"].shape) == (3, 5, 2, 28)


def test_grad_jvp_and_per_sample_gradients_give_usable_tensors():
    model = FiveConvs()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = values(model)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).pow(2).sum()

    plain = grad(loss)(parameters, X)
    for run in (
        lambda: grad(loss)(parameters, X),
        lambda: jvp(model, (X,), (torch.ones_like(X),)),
        lambda: vmap(grad(loss), in_dims=(None, 0))(parameters, X),
    ):
        with capture(model) as acts:
            result = run()
        for name, output in expected.items():
            torch.testing.assert_close(acts[name], output)
            acts[name].add_(1).numpy()
        if isinstance(result, dict) and result["convs.0.bias"].dim() == 1:
            assert same(result, plain)


def test_functional_calls_inside_vmap_are_captured_too():
    model = FunctionalConvs()
    with capture(model) as plain:
        model(X)
    with capture(model) as acts:
        vmap(lambda x: functional_like(model, x))(X)
    for name in ("kernel", "kernels.0"):
        torch.testing.assert_close(acts[name], plain[name])


def functional_like(model, x):
    x = F.relu(F.conv1d(x, model.kernel, padding=1))
    return F.conv1d(x, model.kernels[0], padding="same")


def test_detach_false_inside_a_transform_is_refused_by_name():
    model = FiveConvs()
    with (
        pytest.raises(Unsupported, match="layer 'convs.0': detach=False does not work inside a torch.func transform"),
        capture(model, detach=False),
    ):
        vmap(model)(X)


# -- functional_call, autocast, parametrizations, fx, export, quantization


def test_functional_call_gives_the_values_of_the_given_weights_under_the_modules_names():
    model = FiveConvs()
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with capture(model) as acts:
        functional_call(model, other, (X,))
    torch.testing.assert_close(acts["convs.0"], F.conv1d(X, other["convs.0.weight"], other["convs.0.bias"], padding=2))
    assert len(acts) == 5


def test_autocast_gives_the_tensors_that_were_computed():
    model = FiveConvs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = values(model)
        with capture(model) as acts:
            model(X)
    assert acts["convs.2"].dtype is torch.bfloat16
    assert same(dict(acts), expected)


def test_fx_traced_and_exported_modules_are_captured():
    model = FiveConvs(inplace=True).eval()
    expected = list(values(model).values())
    traced = torch.fx.symbolic_trace(model)
    with capture(traced) as acts:
        traced(X)
    assert same(list(acts.values()), expected)
    assert list(acts) == [f"convs.{i}" for i in range(5)]
    exported = torch.export.export(model, (X,)).module()
    with torch.no_grad(), capture(exported) as acts:
        exported(X)
    assert list(acts) == [f"convs.{i}" for i in range(5)]
    assert same(list(acts.values()), expected)
    assert {call.via for call in acts.calls()} == {"function"}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning", "ignore:.*deprecated.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*must run observer:UserWarning", "ignore:Please use quant_min:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantized_convolutions_are_captured(tmp_path):
    from torch.ao import quantization as tq

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
            self.conv, self.relu = nn.Conv1d(1, 4, 3), nn.ReLU()
            self.last = nn.Conv1d(4, 2, 3)

        def forward(self, x):
            return self.dequant(self.last(self.relu(self.conv(self.quant(x)))))

    def seen(model):
        found = []
        handles = [
            m.register_forward_hook(lambda m, a, y, n=n: found.append((n, y.dequantize().clone())))
            for n, m in model.named_modules()
            if n in ("conv", "last")
        ]
        model(X)
        for handle in handles:
            handle.remove()
        return found

    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    model = Net().eval()
    model.qconfig = tq.get_default_qconfig(torch.backends.quantized.engine)
    fused = tq.fuse_modules(model, [["conv", "relu"]])
    static = tq.convert(_calibrated(tq.prepare(fused)))
    dynamic = tq.quantize_dynamic(Net().eval(), {nn.Conv1d: tq.default_dynamic_qconfig})
    trained = Net().train()
    trained.qconfig = tq.get_default_qat_qconfig(torch.backends.quantized.engine)
    qat = tq.prepare_qat(trained).eval()
    for kind, quantized in (("static", static), ("dynamic", dynamic), ("qat", qat)):
        with capture(quantized) as acts:
            quantized(X)
        assert list(acts) == ["conv", "last"], kind
        assert same([acts[name].dequantize() for name in acts], [value for _, value in seen(quantized)]), kind
    assert isinstance(static.conv, torch.ao.nn.intrinsic.quantized.ConvReLU1d)
    assert acts.numpy()["conv"].dtype.name == "float32"


def _calibrated(model):
    model(X)
    return model


# -- wrappers


def test_data_parallel_on_several_devices_is_refused_with_the_remedy():
    wrapped = nn.DataParallel(FiveConvs())
    with capture(wrapped) as acts:
        wrapped(X)
    assert list(acts) == [f"convs.{i}" for i in range(5)]
    wrapped.device_ids = [0, 1]  # what it has on a machine with two GPUs
    with (
        pytest.raises(Unsupported, match=r"nn.DataParallel on 2 devices .*with capture\(model.module\)"),
        capture(wrapped),
    ):
        pass


def test_checkpoint_wrappers_leave_no_prefix_and_both_spellings_resolve():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = FiveConvs()
    model.convs[1] = checkpoint_wrapper(model.convs[1])
    with capture(model) as acts:
        model(X)
    assert list(acts) == [f"convs.{i}" for i in range(5)]
    assert acts["convs.1._checkpoint_wrapped_module"] is acts["convs.1"]
    with capture(model, "convs.1._checkpoint_wrapped_module") as acts:
        model(X)
    assert list(acts) == ["convs.1"]


DDP = """
import os, sys, torch, torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from convtap import capture

def work(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv1d(2, 2, 3))
    plain.module = nn.Conv1d(2, 2, 1)
    x = torch.randn(2, 1, 20) + rank
    with torch.no_grad():
        first = plain[0](x)
        expected = [first, plain[2](first.relu()), plain.module(plain[2](first.relu()))]
    ddp = nn.parallel.DistributedDataParallel(plain)
    for _ in range(2):
        with capture(ddp) as acts:
            ddp(x).sum().backward()
        assert list(acts) == ["0", "2", "module"], list(acts)
        assert all(torch.equal(a, b) for a, b in zip(acts.values(), expected))
        assert acts["module.0"] is acts["0"] and acts["module.module"] is acts["module"]
        assert {call.forward for call in acts.calls()} == {0}
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    mp.get_context("fork")
    mp.start_processes(work, (2, port), nprocs=2, start_method="fork")
    print("both ranks are well")
"""


def test_distributed_data_parallel_in_two_processes():
    done = run_python(DDP)
    assert "both ranks are well" in done.stdout, done.stderr[-3000:]


FSDP = """
import os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from convtap import capture
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); os.environ["MASTER_PORT"] = str(s.getsockname()[1])
dist.init_process_group("gloo", rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
torch.manual_seed(0)
model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv1d(2, 2, 3))
x = torch.randn(2, 1, 20)
with torch.no_grad():
    first = model[0](x)
    expected = [first.clone(), model[2](first.relu())]
fully_shard(model[2], mesh=mesh); fully_shard(model, mesh=mesh)
with capture(model) as acts:
    model(x).sum().backward()
assert list(acts) == ["0", "2"], list(acts)
assert all(torch.equal(a, b) for a, b in zip(acts.values(), expected))
dist.destroy_process_group()
print("sharded and well")
"""


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="torch 2.6: torch.cpu.Stream has no record_event, without which a fully_shard model does not run on the CPU",
)
def test_fully_sharded_models_on_the_cpu():
    done = run_python(FSDP)
    assert "sharded and well" in done.stdout, done.stderr[-3000:]


def test_an_alias_of_a_module_without_gradient_is_still_watched():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(inplace=True)).requires_grad_(False)
    with capture(model, copy=False) as acts:
        model(X)
    with pytest.raises(ModifiedInPlace):
        acts["0"]
    assert copy.copy(acts).coverage["0"].captured == 1
