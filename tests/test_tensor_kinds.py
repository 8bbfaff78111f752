"""What tensors of other kinds weigh, and how their values are read: wrappers, sparse, nested, quantized, meta and fake ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode

from convtap import MemoryLimitExceeded, StoreError, Unsupported, capture, list_layers, load
from tests.process import run_python

X = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|beta state|deprecated)")


class Pair(torch.Tensor):
    """Two tensors that pass for one, as quantized subclasses keep values and scales; its operators go to both."""

    @staticmethod
    def __new__(cls, values, scales, flattens=True):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values, scales, flattens=True):
        self.values_, self.scales, self.flattens = values, scales, flattens

    def __tensor_flatten__(self):
        if not self.flattens:
            raise NotImplementedError
        return ["values_", "scales"], None

    def __repr__(self):
        return "Pair()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        pair = next(one for one in args if isinstance(one, cls))
        both = [
            func(*(getattr(one, name) if isinstance(one, cls) else one for one in args), **(kwargs or {}))
            for name in ("values_", "scales")
        ]
        return cls(*both, pair.flattens)


class Returns(nn.Module):
    """A layer that returns a tensor of some kind."""

    def __init__(self, make):
        super().__init__()
        self.layer = nn.Identity()
        self.make = make

    def forward(self, x):
        return self.layer(self.make(x))


class Twice(Returns):
    """Two layers that hand on one tensor."""

    def __init__(self, make):
        super().__init__(make)
        self.second = nn.Identity()

    def forward(self, x):
        return self.second(super().forward(x))


@pytest.fixture
def mesh():
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def of(make, **options):
    model = Returns(make)
    with torch.no_grad(), warnings.catch_warnings(), capture(model, "layer", **options) as acts:
        warnings.simplefilter("ignore")
        model(X)
    return acts


def rows():
    return [torch.zeros(2, 3), torch.ones(4, 3)]


KINDS = {  # what makes it, and the bytes of its parts by hand
    "wrapper": (lambda x: Pair(torch.ones(5, 4), torch.ones(3)), 5 * 4 * 4 + 3 * 4),
    "wrapper in a wrapper": (lambda x: Pair(Pair(torch.ones(5), torch.ones(2)), torch.ones(3)), 40),
    "wrapper that cannot be flattened": (lambda x: Pair(torch.ones(5), torch.ones(3), False), 32),
    "masked": (lambda x: torch.masked.masked_tensor(torch.ones(6), torch.ones(6).bool()), 6 * 4 + 6),
    "jagged": (lambda x: torch.nested.nested_tensor(rows(), layout=torch.jagged), 18 * 4 + 3 * 8),
    "nested": (lambda x: torch.nested.nested_tensor(rows()), 18 * 4),
    "coo": (lambda x: torch.eye(3).to_sparse(), 3 * 4 + 2 * 3 * 8),
    "csr": (lambda x: torch.eye(3).to_sparse_csr(), 3 * 4 + 4 * 8 + 3 * 8),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), 20),
    "complex": (lambda x: torch.complex(x, x), 20 * 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nbytes_the_forecast_and_max_bytes_count_every_part_of_a_tensor(kind):
    make, size = KINDS[kind]
    assert of(make).nbytes == size
    (row,) = list_layers(Returns(make), "layer", example=X)
    assert row.nbytes == size
    assert of(make, max_bytes=size).nbytes == size
    with pytest.raises(MemoryLimitExceeded, match=r"the output of 'layer' needs .*, which is more than "):
        of(make, max_bytes=size - 1)


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.6, of the CPU
@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_a_dtensor_weighs_its_local_part_and_reads_as_an_array(mesh, placement, tmp_path):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    values = torch.randn(4, 6)

    def make(x):
        return distribute_tensor(values, mesh, [Shard(0) if placement == "shard" else Replicate()])

    acts = of(make)
    assert acts.nbytes == acts.calls()[0].nbytes == 4 * 6 * 4
    assert list_layers(Returns(make), "layer", example=X)[0].nbytes == 4 * 6 * 4
    with pytest.raises(MemoryLimitExceeded):
        of(make, max_bytes=1)
    assert np.array_equal(acts.numpy()["layer"], values.numpy())
    assert f"{values.max():.4g}" in str(acts.summary(stats=True))
    acts.save(tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")["layer"], values)


SHARDED = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from convtap import capture

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))

class Returns(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.whole = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.part(distribute_tensor(x, mesh, [Shard(0)])), self.whole(distribute_tensor(x, mesh, [Replicate()]))

model = Returns()
with capture(model, types=nn.Identity) as acts:
    model(torch.zeros(4, 3))
print([call.nbytes for call in acts.calls()], acts.nbytes)
for read in (acts.numpy, lambda: acts.summary(stats=True), lambda: acts.save(sys.argv[1])):
    try:
        read()
    except Exception as error:
        print(type(error).__name__, error)
with capture(model, "part", reduce=lambda t: t.to_local()) as acts:
    model(torch.zeros(4, 3))
print(acts.numpy()["part"].shape)
"""


def test_a_dtensor_of_which_other_processes_hold_a_part_is_not_read_as_if_it_were_whole(tmp_path):
    lines = run_python(SHARDED, str(tmp_path / "a")).stdout.splitlines()
    assert lines[0] == "[24, 48] 72"
    for line, kind in zip(lines[1:4], ("Unsupported", "Unsupported", "StoreError"), strict=True):
        assert line.startswith(f"{kind} the output of 'part' is a DTensor with placements")
        assert "reduce=lambda t: t.to_local()" in line
    assert lines[4] == "(2, 3)"


def two_convolutions():
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.Identity(), nn.Conv1d(4, 2, 3))


def test_the_forecast_of_a_meta_model_is_that_of_the_real_one():
    real = [(row.name, row.shape, row.nbytes) for row in list_layers(two_convolutions(), types=nn.Module, example=X)]
    meta = list_layers(two_convolutions().to("meta"), types=nn.Module, example=X.to("meta"))
    assert [(row.name, row.shape, row.nbytes) for row in meta] == real
    assert sum(size for _, _, size in real) == (2 * 4 * 8 + 2 * 2 * 6) * 4  # the identity shares its input's memory


def test_the_forecast_of_a_fake_model_is_that_of_the_real_one():
    real = [(row.used, row.shape, row.nbytes) for row in list_layers(two_convolutions(), example=X)]
    with FakeTensorMode():
        fake = list_layers(two_convolutions(), example=torch.zeros(2, 1, 10))
    assert [(row.used, row.shape, row.nbytes) for row in fake] == real


def test_the_forecast_of_a_meta_model_follows_reduce_and_dtype():
    model = nn.Sequential(nn.Conv1d(1, 4, 3)).to("meta")
    options = {"reduce": lambda t: t.mean(-1), "dtype": torch.float16}
    (row,) = list_layers(model, example=X.to("meta"), **options)
    assert (row.shape, row.nbytes) == ((2, 4), 2 * 4 * 2)


def test_two_layers_that_hand_on_one_wrapper_count_what_each_of_them_keeps():
    model = Twice(lambda x: Pair(torch.ones(5), torch.ones(3)))
    with torch.no_grad(), capture(model, types=nn.Identity) as acts:
        model(X)
    assert acts.nbytes == 2 * 32  # a wrapper is cloned: it has no copy-on-write snapshot


@pytest.mark.parametrize("kind", ["coo", "csr", "quantized"])
def test_sparse_and_quantized_outputs_become_dense_arrays(kind):
    make, _ = KINDS[kind]
    expected = make(X).dequantize() if kind == "quantized" else make(X).to_dense()
    assert np.array_equal(of(make).numpy()["layer"], expected.numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (KINDS["jagged"][0], r"'layer' is nested.*reduce=lambda t: torch\.nested\.to_padded_tensor"),
        (KINDS["nested"][0], r"'layer' is nested.*reduce=lambda t: torch\.nested\.to_padded_tensor"),
        (KINDS["masked"][0], "'layer' is a MaskedTensor.*reduce="),
        (KINDS["wrapper"][0], "'layer' is a Pair.*reduce="),
        (lambda x: x.to("meta"), r"'layer' is on meta|'layer' is on 'meta'"),
    ],
    ids=["jagged", "nested", "masked", "wrapper", "meta"],
)
def test_an_output_without_an_array_says_so_by_name(make, message, tmp_path):
    acts = of(make)
    with pytest.raises(Unsupported, match=message):
        acts.numpy()
    with pytest.raises(StoreError, match="'layer' is"):
        acts.save(tmp_path / "a")


def test_statistics_of_nested_outputs_are_those_of_all_rows():
    for kind in ("jagged", "nested"):
        table = str(of(KINDS[kind][0]).summary(stats=True))
        assert f"{torch.cat(rows()).mean():.4g}" in table


def test_the_shape_of_a_nested_output_is_the_shapes_of_its_rows():
    assert of(KINDS["nested"][0]).calls()[0].shape == ((2, 3), (4, 3))
