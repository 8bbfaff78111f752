"""Offloading: nobody reads an unfinished copy, nothing is overwritten or freed under one, and everything is bounded.

Most tests run on every backend in ``BACKENDS``. On a machine without CUDA that is the fake of ``tests/streams.py`` alone: the
ordering is proved there, and the CUDA half of this module has then NOT been run. Nothing is skipped; the parameter is
absent. Measured on neither: speed (see benchmarks/offload.py).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap import ConvtapError, MemoryLimitExceeded, ModifiedInPlace, Unsupported, capture
from convtap._errors import OffloadWarning
from convtap._offload.cuda_streams import CudaStreams
from convtap._offload.offloader import Offloader
from convtap._offload.transfers import Transfers
from convtap._tensors.memory import data_address
from tests.models import AfterConv, FiveConvs, RaisesHalfway, ReusedConv
from tests.reference import cloning_hooks, patched_conv1d, same
from tests.streams import Broken, FakeStreams, garble

SMALL = {"pinned": 1 << 20, "slab": 1 << 14}


class Fake:
    """The fake, on the CPU."""

    def __init__(self, seed: int = 0, **options) -> None:
        self.streams = FakeStreams(seed, **options)

    def put(self, value):
        return value

    @contextlib.contextmanager
    def stream(self):
        device = torch.device("cuda", 0)
        before = self.streams.current(device)
        self.streams.computing[device] = self.streams.stream("the user's")
        yield
        self.streams.computing[device] = before

    def lag(self) -> None:
        self.streams.eager = 0


class Cuda:
    """A CUDA device, with deterministic convolutions in full precision."""

    def __init__(self, seed: int = 0) -> None:
        self.streams = CudaStreams()

    def put(self, value):
        return value.cuda()

    @contextlib.contextmanager
    def stream(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def lag(self) -> None:
        torch.cuda._sleep(20_000_000)


BACKENDS = [Fake, Cuda] if torch.cuda.is_available() else [Fake]


@pytest.fixture(params=BACKENDS, ids=lambda kind: kind.__name__.lower())
def backend(request, monkeypatch):
    if request.param is Cuda:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param()


def offloading(model, backend, *args, sizes=SMALL, **options):
    """A capture whose offloader works on the backend's streams, with small sizes so that every limit is met."""
    found = capture(model, *args, offload="cpu", **options)
    offloader = Offloader("cpu", streams=backend.streams, **{"window": 1 << 14, **sizes})
    found._options = dataclasses.replace(found._options, offloader=offloader)
    return found


def on_cpu(seen) -> list[Tensor]:
    return [value.cpu() for _, value in seen]


class Scratch(nn.Module):
    """Asks the allocator for memory of the size of its input again and again, and fills it with NaN; then ReLU in place."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            torch.full_like(x, float("nan"))
        x.relu_()
        torch.full_like(x, float("nan"))
        return x


# -- under fire


def test_a_thousand_captures_equal_a_synchronized_reference(backend):
    model = backend.put(FiveConvs(inplace=True))
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend) as acts:
        for i in range(200):
            if i % 50 == 0:
                backend.lag()
            model(backend.put(torch.randn(2, 1, 30)))
    assert len(acts) == 1000
    assert all(output.device.type == "cpu" for output in acts.values())
    assert same([call.output for call in acts.calls()], on_cpu(seen))


@pytest.mark.parametrize("keep", ["all", "last"])
def test_memory_that_the_allocator_gives_out_again_spoils_no_copy(backend, keep):
    convs = [nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), Scratch()) for _ in range(8)]
    model = backend.put(nn.Sequential(*convs))
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend, keep=keep) as acts:
        for _ in range(20):
            backend.lag()
            model(backend.put(torch.randn(3, 4, 64)))
    assert len(acts) == (160 if keep == "all" else 8)
    assert same([call.output for call in acts.calls()], on_cpu(seen)[-len(acts) :])


def test_each_copy_waits_for_the_stream_that_the_model_runs_on(backend):
    model = backend.put(FiveConvs(inplace=True))
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend) as acts:
        for i in range(20):
            with backend.stream() if i % 2 else contextlib.nullcontext():
                backend.lag()
                model(backend.put(torch.randn(2, 1, 30)))
    assert same([call.output for call in acts.calls()], on_cpu(seen))


def test_reading_inside_the_block_gives_finished_values(backend):
    model = backend.put(FiveConvs(inplace=True))
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend, sizes={"window": 1 << 20}) as acts:
        backend.lag()
        model(backend.put(torch.randn(2, 1, 30)))
        found = [acts[f"convs.{i}"].clone() for i in (4, 0, 2, 1, 3)]
    assert same(found, [on_cpu(seen)[i] for i in (4, 0, 2, 1, 3)])


def test_another_thread_may_read_while_the_model_runs(backend):
    model = backend.put(FiveConvs(inplace=True))
    found: list[tuple[int, Tensor]] = []
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend) as acts:

        def read() -> None:
            found.extend((call.index, call.output) for call in acts.calls("convs.4"))

        for _ in range(5):
            backend.lag()
            model(backend.put(torch.randn(2, 1, 30)))
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
    expected = [value.cpu() for name, value in seen if name == "convs.4"]
    assert len(found) == 15
    assert all(same(output, expected[index]) for index, output in found)


@pytest.mark.parametrize("options", [{"copy": False}, {"at": "input"}, {"at": "input", "copy": False}])
def test_what_moves_to_another_device_is_safe_from_in_place_operations_in_any_case(backend, options):
    model = backend.put(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU(inplace=True), nn.Conv1d(2, 3, 1), Scratch()))
    reference = []
    pick = (lambda args, output: args[0]) if "at" in options else (lambda args, output: output)
    for i in (0, 2):
        model[i].register_forward_hook(lambda m, args, output: reference.append(pick(args, output).detach().clone()))
    x = backend.put(torch.randn(2, 2, 40))
    with torch.no_grad(), offloading(model, backend, **options) as acts:
        backend.lag()
        model(x)
        x.zero_()
    assert same([acts["0"], acts["2"]], [value.cpu() for value in reference])


def test_gradients_flow_back_through_the_copy(backend):
    model, x = backend.put(FiveConvs(inplace=True)), backend.put(torch.randn(2, 1, 30))
    with offloading(model, backend, detach=False) as acts:
        backend.lag()
        model(x)
    sum((output**2).sum() for output in acts.values()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    loss, y = 0, x
    for conv in model.convs:
        y = conv(y)
        loss = loss + (y**2).sum()
        y = y.relu()
    loss.backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_reduce_and_dtype_run_before_the_copy(backend):
    model, x = backend.put(FiveConvs(inplace=True)), backend.put(torch.randn(2, 1, 30))
    devices = []

    def first_channel(tensor: Tensor) -> Tensor:
        devices.append(tensor.device.type)
        return tensor[:, :1]

    with torch.no_grad(), cloning_hooks(model) as seen:
        with offloading(model, backend, reduce=first_channel, dtype=torch.float16) as acts:
            model(x)
    assert devices == [x.device.type] * 5
    assert same(list(acts.values()), [value[:, :1].half() for value in on_cpu(seen)])
    assert acts.nbytes == 5 * 2 * 30 * 2
    if isinstance(backend, Fake):
        assert max(backend.streams.flying.values(), default=0) <= 2 * 30 * 2


SHAPES = {
    "transposed": lambda t: t.transpose(1, 2),
    "every other frame": lambda t: t[..., ::2],
    "one channel": lambda t: t[:, :1],
    "expanded": lambda t: t[:1].expand(3, -1, -1),
    "conjugated": lambda t: torch.complex(t, t).conj(),
    "negated view": lambda t: torch.complex(t, t).conj().imag,
    "one value": lambda t: t.sum(),
    "empty": lambda t: t[:0],
    "boolean": lambda t: t > 0,
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double(),
    "size-1 axes": lambda t: t.unsqueeze(0).transpose(0, 2),
    "structure": lambda t: {"a": (t, None), "b": [t.transpose(1, 2), 3]},
    "channels last": lambda t: t.unsqueeze(-1).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", SHAPES)
def test_any_layout_and_type_arrives_as_it_was(backend, name):
    class Conv(nn.Conv1d):
        def forward(self, x):
            return SHAPES[name](super().forward(x))

    model, x = backend.put(Conv(2, 4, 3)), backend.put(torch.randn(2, 2, 33))
    with torch.no_grad():
        expected = model(x)
        with offloading(nn.Sequential(model), backend) as acts:
            backend.lag()
            model(x)
    found = acts["0"]
    if isinstance(expected, dict):
        assert same(found, {"a": (expected["a"][0].cpu(), None), "b": [expected["b"][0].cpu(), 3]})
        return
    assert found.device.type == "cpu"
    assert torch.equal(found, expected.cpu())
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if name in ("transposed", "channels last"):
        assert found.stride() == expected.stride()


def test_inference_mode_works(backend):
    model, x = backend.put(FiveConvs(inplace=True)), backend.put(torch.randn(2, 1, 30))
    with torch.inference_mode(), cloning_hooks(model) as seen, offloading(model, backend) as acts:
        model(x)
        model(x)
    assert same([call.output for call in acts.calls()], on_cpu(seen))


def test_convolutions_called_as_functions_are_offloaded_too(backend):
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 1, 3)), nn.Linear(4, 5)

        def forward(self, x):
            return F.conv1d(F.conv1d(x, self.a).relu_(), self.b.weight.unsqueeze(-1)).relu_()

    model, x = backend.put(Loose()), backend.put(torch.randn(2, 1, 12))
    with torch.no_grad(), patched_conv1d() as seen:
        model(x)
    with torch.no_grad(), offloading(model, backend) as acts:
        backend.lag()
        model(x)
    assert list(acts) == ["a", "b"]
    assert same([call.output for call in acts.calls()], [value.cpu() for value in seen])


def test_convolutions_inside_torchscript_are_offloaded_too(backend):
    model, x = backend.put(FiveConvs().eval()), backend.put(torch.randn(2, 1, 30))
    with torch.no_grad(), cloning_hooks(model) as seen:
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(model, x)
    with torch.no_grad(), offloading(scripted, backend) as acts:
        backend.lag()
        scripted(x)
    assert same([call.output for call in acts.calls()], on_cpu(seen))


def test_a_default_device_of_the_user_does_not_reach_the_copies(backend):
    model, x = backend.put(FiveConvs(inplace=True)), backend.put(torch.randn(2, 1, 30))
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend) as acts, torch.device("meta"):
        model(x)
    assert same(list(acts.values()), on_cpu(seen))


def test_max_bytes_counts_what_offloading_keeps_and_moving_on_does_not_disturb_it(backend):
    model, a_pass = backend.put(FiveConvs()), 2 * (4 + 4 + 8 + 8 + 8) * 30 * 4
    sizes = {"pinned": 1 << 14, "slab": 1 << 14}  # two passes are pinned, the others move on
    with torch.no_grad(), offloading(model, backend, sizes=sizes, max_bytes=6 * a_pass) as acts:
        for _ in range(6):
            model(backend.put(torch.randn(2, 1, 30)))
        acts.clear()
        for _ in range(6):
            model(backend.put(torch.randn(2, 1, 30)))
    assert acts.nbytes == 6 * a_pass
    with torch.no_grad(), pytest.raises(MemoryLimitExceeded, match=r"'convs.0' needs 960 B more"):
        with offloading(model, backend, sizes=sizes, max_bytes=6 * a_pass):
            for _ in range(7):
                model(backend.put(torch.randn(2, 1, 30)))


def test_the_copy_leaves_the_snapshot_shared_with_the_model(backend):
    x = backend.put(torch.randn(64))
    snapshot = torch._lazy_clone(x)
    offloader = Offloader("cpu", streams=backend.streams, **SMALL)
    held = offloader.move(snapshot)
    assert torch._C._is_cow_tensor(snapshot)
    assert data_address(snapshot) == data_address(x)
    assert same(held.read("a"), x.cpu())


def test_the_device_needs_no_more_memory_than_the_window(backend):
    model = backend.put(nn.Sequential(*(nn.Conv1d(8, 8, 1) for _ in range(40))))
    x = backend.put(torch.randn(4, 8, 8192))  # 1 MiB, as every output
    window = 4 << 20
    sizes = {"window": window, "pinned": 64 << 20, "slab": 8 << 20}
    with torch.no_grad():
        model(x)  # the first run may need more than the others
        plain = 0 if isinstance(backend, Fake) else peak_memory(backend, lambda: model(x))
        with offloading(model, backend, sizes=sizes):
            backend.lag()
            tapped = peak_memory(backend, lambda: model(x))
    # On CUDA one output more: the one that is being computed while the window is full.
    assert tapped - plain <= window + (0 if isinstance(backend, Fake) else 1 << 20)


def peak_memory(backend, run) -> int:
    if isinstance(backend, Fake):
        run()
        return backend.streams.most
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


# -- what a result is


def test_a_result_owns_exactly_its_bytes(backend):
    model = backend.put(FiveConvs())
    with torch.no_grad(), offloading(model, backend) as acts:
        model(backend.put(torch.randn(2, 1, 30)))
    sizes = [2 * channels * 30 * 4 for channels in (4, 4, 8, 8, 8)]
    assert [output.untyped_storage().nbytes() for output in acts.values()] == sizes
    assert acts.nbytes == sum(sizes)
    file = io.BytesIO()
    torch.save(acts["convs.0"], file)
    assert len(file.getvalue()) < sizes[0] + 2000


def test_results_have_versions_of_their_own(backend):
    model = backend.put(FiveConvs())
    with torch.no_grad(), offloading(model, backend) as acts:
        model(backend.put(torch.randn(2, 1, 30)))
    a, b = acts["convs.0"].requires_grad_(), acts["convs.1"]
    loss = (a**2).sum()
    b.add_(1)  # is no change of a, which the backward pass needs
    loss.backward()
    assert same(a.grad, 2 * a.detach())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_the_activations_has_the_values(backend, copied):
    model, x = backend.put(FiveConvs(inplace=True)), backend.put(torch.randn(2, 1, 30))
    with torch.no_grad(), cloning_hooks(model) as seen:
        model(x)
    with torch.no_grad(), offloading(model, backend) as acts:
        backend.lag()
        model(x)
        twin = copied(acts)
    del acts
    assert same(list(twin.values()), on_cpu(seen))


def test_views_wait_for_nothing():
    backend = Fake()  # only the fake can say that nobody waited
    model = FiveConvs()
    with torch.no_grad(), offloading(model, backend) as acts:
        backend.lag()
        model(torch.randn(2, 1, 30))
        before = dict(backend.streams.flying)
        assert "convs.4" in repr(acts)
        assert acts.calls()[0].shape == (2, 4, 30)
        assert acts.nbytes
        assert backend.streams.flying == before
        assert len(before) == 5


# -- the end of a block


def test_leaving_the_block_waits_for_all_copies(backend):
    model = backend.put(FiveConvs())
    block = offloading(model, backend)
    with torch.no_grad(), block as acts:
        backend.lag()
        model(backend.put(torch.randn(2, 1, 30)))
    assert landed(block, backend)
    assert len(acts) == 5


def test_leaving_the_block_waits_also_when_the_body_raises(backend):
    model = backend.put(RaisesHalfway())
    block = offloading(model, backend)
    with torch.no_grad(), cloning_hooks(model) as seen:
        with pytest.raises(RuntimeError, match="halfway"), block as acts:
            backend.lag()
            model(backend.put(torch.randn(2, 1, 30)))
    assert landed(block, backend)
    assert same(acts["a"], on_cpu(seen)[0])


def landed(block, backend) -> bool:
    all_transfers = block._options.offloader._transfers.values()
    assert all_transfers
    unfinished = isinstance(backend, Fake) and backend.streams.flying
    return not unfinished and not any(transfers._copies or transfers._bytes for transfers in all_transfers)


def test_a_block_that_is_never_left_still_outlives_its_copies(backend):
    offloader = Offloader("cpu", streams=backend.streams, **SMALL)
    backend.lag()
    offloader.move(backend.put(torch.randn(64)))
    transfers = next(iter(offloader._transfers.values()))
    copies = transfers._copies
    del offloader, transfers
    assert not copies


# -- the order of things, on the fake alone: CUDA cannot be asked for its worst case


def written_later(streams: FakeStreams, shape=(64,)) -> tuple[Tensor, Tensor]:
    """A tensor that the compute stream writes in its own time, and what it writes."""
    source, value = torch.empty(shape), torch.randn(shape)
    garble(source)
    plain = source.numpy()
    streams.compute(lambda: plain.__setitem__(..., value.numpy()))
    return source, value


@pytest.mark.parametrize("seed", range(30))
def test_a_copy_begins_after_the_computation_and_is_read_after_its_event(seed):
    streams = FakeStreams(seed)
    offloader = Offloader("cpu", streams=streams, window=4000, **SMALL)
    pairs = []
    for _ in range(30):
        source, value = written_later(streams)
        pairs.append((offloader.move(source), value))
        del source
    order = list(range(30))
    streams.random.shuffle(order)
    for i in order:
        assert torch.equal(pairs[i][0].read("x"), pairs[i][1])


def test_the_compute_stream_is_asked_for_before_the_copy_and_events_are_used_again():
    streams = FakeStreams()
    offloader = Offloader("cpu", streams=streams, **SMALL)
    for _ in range(3):
        offloader.move(torch.randn(8)).read("x")
    once = [
        "current",
        "record on compute cuda:0",
        "side cuda:0 waits",
        "copy on side cuda:0",
        "record on side cuda:0",
    ]
    assert streams.log == ["event", *once, *once, *once]


@pytest.mark.parametrize("left_out", ["wait", "source", "event"])
def test_the_fake_shows_each_mistake(left_out):
    """The proof that the tests above can fail: each protection left out gives a wrong value."""
    wrong = 0
    for seed in range(20):
        streams = FakeStreams(seed)
        source, value = written_later(streams)
        compute, side, event = streams.current(torch.device("cuda", 0)), streams.stream("side"), streams.event()
        destination = torch.empty(64)
        streams.record(event, compute)
        if left_out != "wait":
            streams.wait_for(side, event)
        streams.copy(destination, source, side)
        streams.record(event, side)
        if left_out == "source":
            del source
        if left_out != "event":
            streams.synchronize(event)
        wrong += not torch.equal(destination, value)
    assert wrong


def test_a_copy_into_memory_that_was_freed_is_an_error_in_the_fake():
    streams = FakeStreams()
    event, side = streams.event(), streams.side(torch.device("cuda", 0))
    streams.copy(torch.empty(4), torch.ones(4), side)
    streams.record(event, side)
    with pytest.raises(Broken, match="memory that was freed"):
        streams.synchronize(event)


class Locked(FakeStreams):
    """The fake for several threads: one at a time does something, and the time goes on between."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        super().__init__(seed)

    def copy(self, *args):
        with self.lock:
            super().copy(*args)

    def record(self, *args):
        with self.lock:
            super().record(*args)

    def wait_for(self, *args):
        with self.lock:
            super().wait_for(*args)

    def current(self, *args):
        with self.lock:
            return super().current(*args)

    def has_passed(self, *args):
        with self.lock:
            return super().has_passed(*args)

    def synchronize(self, *args):
        with self.lock:
            super().synchronize(*args)


@pytest.mark.parametrize("seed", range(3))
def test_several_threads_may_move_and_read_at_once(seed):
    streams = Locked(seed)
    sizes = {"window": 6000, "pinned": 1 << 14, "slab": 1 << 12}
    offloader = Offloader("cpu", streams=streams, **sizes)
    wrong: list[object] = []
    shared: list[tuple[object, Tensor]] = []

    def work(number: int) -> None:
        try:
            for i in range(60):
                value = torch.full((100 + 10 * i,), float(1000 * number + i))
                shared.append((offloader.move(value.clone()), value))
                held, expected = shared[(7 * i + number) % len(shared)]
                if i % 3 == 0 and not torch.equal(held.read("x") if hasattr(held, "read") else held, expected):
                    wrong.append((number, i))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert offloader.drain()
    assert not wrong
    assert len(shared) == 240
    assert all(torch.equal(held.read("x") if hasattr(held, "read") else held, value) for held, value in shared)
    assert sum(streams.pinned_sizes) <= sizes["pinned"]


def test_a_result_that_is_replaced_while_it_is_copied_keeps_its_memory_until_the_copy_is_done():
    backend = Fake()
    backend.lag()
    model = ReusedConv()
    with torch.no_grad(), cloning_hooks(model) as seen:
        with offloading(model, backend, keep="last", sizes={"window": 1 << 20}) as acts:
            for _ in range(20):
                model(torch.randn(1, 4, 20))
            assert len(backend.streams.flying) == 80  # nothing was done yet, and 78 of the results are gone
    assert same([acts["conv"], acts["last"]], [seen[-2][1], seen[-1][1]])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("window", [1000, 4096, 10_000])
def test_the_window_is_never_exceeded(seed, window):
    backend = Fake(seed)
    model = FiveConvs(inplace=True)
    with torch.no_grad(), offloading(model, backend, sizes={"window": window}):
        for _ in range(20):
            model(torch.randn(1, 1, 30))  # 480 and 960 bytes an output
    assert backend.streams.copies == 100
    assert 480 <= backend.streams.most <= window


def test_a_window_that_has_room_stops_nobody():
    backend = Fake()
    backend.lag()
    model = FiveConvs()
    with torch.no_grad(), offloading(model, backend, sizes={"window": 480 * 2 + 960 * 3}):
        model(torch.randn(1, 1, 30))
        assert len(backend.streams.flying) == 5


def test_a_tensor_larger_than_the_window_goes_alone():
    backend = Fake()
    backend.lag()
    model = FiveConvs(inplace=True)
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend, sizes={"window": 10}) as acts:
        model(torch.randn(1, 1, 30))
    assert backend.streams.most_copies == 1
    assert same(list(acts.values()), on_cpu(seen))


def test_a_part_of_a_larger_storage_counts_what_it_keeps_alive():
    streams = FakeStreams()
    streams.eager = 0
    offloader = Offloader("cpu", streams=streams, window=9000, **SMALL)
    for _ in range(3):
        offloader.move(torch.randn(10, 100)[:1])  # 400 bytes of 4000
    assert len(streams.flying) == 2


def test_each_device_has_a_stream_and_a_window_of_its_own():
    backend = Fake(place=lambda tensor: int(tensor.shape[1] == 8))  # as a model that lies on two devices
    backend.lag()
    model = FiveConvs(inplace=True)
    with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend, sizes={"window": 2000}) as acts:
        model(torch.randn(1, 1, 30))
        assert backend.streams.most == 480 * 2 + 960 * 2
    assert [device.index for device in backend.streams.sides] == [0, 1]
    assert same(list(acts.values()), on_cpu(seen))
    assert [line for line in backend.streams.log if "copy" in line] == ["copy on side cuda:0"] * 2 + [
        "copy on side cuda:1"
    ] * 3


# -- errors


@pytest.mark.parametrize("where", ["fail_at", "fail_launch_at"])
def test_an_error_in_a_copy_surfaces_at_the_read_and_at_the_exit_and_names_the_layer(where):
    backend = Fake()
    setattr(backend.streams, where, {2})
    model = FiveConvs(inplace=True)
    message = (
        r"the output of 'convs.2' was lost: its copy to the CPU failed with RuntimeError: copy 2 .*without offload"
    )
    with torch.no_grad(), cloning_hooks(model) as seen:
        with pytest.raises(ConvtapError, match=message), offloading(model, backend) as acts:
            model(torch.randn(2, 1, 30))
            with pytest.raises(ConvtapError, match=message):
                acts["convs.2"]
    for _ in range(2):
        with pytest.raises(ConvtapError, match=message):
            acts["convs.2"]
    rest = [0, 1, 3, 4]
    assert same([acts[f"convs.{i}"] for i in rest], [on_cpu(seen)[i] for i in rest])


def test_an_error_that_is_found_while_another_layer_waits_is_not_that_layers():
    backend = Fake()
    backend.streams.fail_at = {0}
    model = FiveConvs()
    with torch.no_grad(), pytest.warns(UserWarning, match="'convs.0' was lost"):
        with offloading(model, backend, strict=False, sizes={"window": 10}) as acts:
            model(torch.randn(2, 1, 30))
            assert acts["convs.1"].shape == (2, 4, 30)
    with pytest.raises(ConvtapError, match="'convs.0' was lost"):
        acts["convs.0"]


def test_an_error_in_a_copy_does_not_hide_the_bodys():
    backend = Fake()
    backend.streams.fail_at = {0}
    model = RaisesHalfway()
    with pytest.raises(RuntimeError, match="halfway"), offloading(model, backend):
        model(torch.randn(1, 1, 9))


def test_a_capture_works_again_after_a_failed_copy():
    backend = Fake()
    backend.streams.fail_at = {0}
    model = FiveConvs()
    block = offloading(model, backend)
    with pytest.raises(ConvtapError, match="'convs.0' was lost"), block:
        model(torch.randn(1, 1, 30))
    with block as acts:
        model(torch.randn(1, 1, 30))
    assert len(list(acts.values())) == 5


def test_an_error_in_the_copy_of_an_input_surfaces_at_the_exit_too():
    backend = Fake()
    backend.streams.fail_at = {0}  # the first copy is that of the first layer's input
    model = FiveConvs()
    with torch.no_grad(), pytest.raises(ConvtapError, match="'convs.0' was lost"):
        with offloading(model, backend, inputs=True) as acts:
            model(torch.randn(1, 1, 30))
    with pytest.raises(ConvtapError, match="'convs.0' was lost"):
        acts.calls("convs.0")[0].input  # noqa: B018
    assert acts["convs.0"].shape == (1, 4, 30)


def test_a_cuda_graph_capture_is_refused_by_name():
    backend = Fake()
    backend.streams.capturing = True
    model = FiveConvs()
    message = "layer 'convs.0': offload does not work while a CUDA graph is captured.*without offload"
    with pytest.raises(Unsupported, match=message), offloading(model, backend):
        model(torch.randn(1, 1, 30))


# -- pinned memory


def test_slabs_are_used_again_from_pass_to_pass():
    backend = Fake()
    model = FiveConvs()
    with torch.no_grad(), offloading(model, backend, keep="last"):
        for _ in range(100):
            model(torch.randn(2, 1, 30))  # 7.7 kB a pass, of slabs of 16 kB
    assert sum(backend.streams.pinned_sizes) <= 4 * SMALL["slab"]


def test_pinned_memory_is_bounded_and_the_oldest_results_move_to_pageable_memory():
    backend = Fake()
    model = FiveConvs(inplace=True)
    sizes = {"pinned": 1 << 16, "slab": 1 << 14}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), cloning_hooks(model) as seen, offloading(model, backend, sizes=sizes) as acts:
            for _ in range(60):
                model(torch.randn(2, 1, 30))  # 460 kB in all
    assert sum(backend.streams.pinned_sizes) == 1 << 16
    assert same([call.output for call in acts.calls()], on_cpu(seen))


def test_a_result_that_was_read_stays_where_it_is():
    backend = Fake()
    model = FiveConvs(inplace=True)
    sizes = {"pinned": 1 << 15, "slab": 1 << 14}
    with torch.no_grad(), offloading(model, backend, sizes=sizes) as acts:
        model(torch.randn(2, 1, 30))
        first = acts["convs.0"]
        first.fill_(7)
        for _ in range(30):
            model(torch.randn(2, 1, 30))
    assert acts.calls("convs.0")[0].output is first
    assert first.eq(7).all()
    assert sum(backend.streams.pinned_sizes) <= 1 << 15


def test_pinned_memory_that_results_hold_is_not_given_out_and_comes_back_with_the_last_of_them():
    backend = Fake()
    model = FiveConvs()
    block = offloading(model, backend)
    with torch.no_grad(), block as acts:
        model(torch.randn(2, 1, 30))
    view = acts["convs.4"][0]
    expected = view.clone()
    del acts
    with block as acts:
        model(torch.randn(2, 1, 30))
    assert torch.equal(view, expected)
    del acts, view
    with block:
        model(torch.randn(2, 1, 30))
    assert len(backend.streams.pinned_sizes) == 1


def test_a_tensor_larger_than_a_slab_gets_a_slab_of_its_own_and_the_rest_of_it_is_used():
    streams = FakeStreams()
    offloader = Offloader("cpu", streams=streams, pinned=1 << 16, slab=1 << 12)
    big = offloader.move(torch.ones(5000))  # 20 kB: 32 kB, as torch's allocator would round
    small = [offloader.move(torch.full((1000,), float(i))) for i in range(3)]
    assert streams.pinned_sizes == [1 << 15]
    assert big.read("x").sum() == 5000
    assert [held.read("x")[0].item() for held in small] == [0, 1, 2]


@pytest.mark.parametrize("slabs", [0, 1])
def test_without_more_pinned_memory_nothing_is_lost_and_the_block_warns(slabs):
    backend = Fake()
    backend.streams.refuse_after = slabs
    model = FiveConvs(inplace=True)
    with torch.no_grad(), cloning_hooks(model) as seen:
        with contextlib.ExitStack() as stack:
            if not slabs:
                message = (
                    r"10 outputs \(15.0 KiB\) went through pageable memory, and the device waited for the copies: "
                    r"the system refused to pin more memory \(RuntimeError: CUDA error: out of memory\)\. No output is lost\."
                )
                found = stack.enter_context(pytest.warns(OffloadWarning, match=message))
            acts = stack.enter_context(offloading(model, backend))
            for _ in range(6 if slabs else 2):
                model(torch.randn(2, 1, 30))
    if not slabs:
        assert len(found) == 1
    assert backend.streams.attempts == slabs + 1  # asking the system again and again would cost at every layer
    assert same([call.output for call in acts.calls()], on_cpu(seen))


def test_an_output_larger_than_all_pinned_memory_is_copied_and_the_block_warns():
    backend = Fake()
    model = FiveConvs()
    with torch.no_grad(), cloning_hooks(model) as seen:
        with pytest.warns(OffloadWarning, match=r"3 outputs \(5.6 KiB\).*all 1.0 KiB that a capture may pin were in"):
            with offloading(model, backend, sizes={"pinned": 1024, "slab": 1024}) as acts:
                model(torch.randn(2, 1, 30))
    assert same(list(acts.values()), on_cpu(seen))


def test_results_that_were_all_read_make_the_rest_go_through_pageable_memory():
    backend = Fake()
    model = FiveConvs(inplace=True)
    sizes = {"pinned": 1 << 14, "slab": 1 << 14}
    with torch.no_grad(), cloning_hooks(model) as seen, pytest.warns(OffloadWarning, match="No output is lost"):
        with offloading(model, backend, sizes=sizes) as acts:
            for _ in range(4):
                model(torch.randn(2, 1, 30))
                kept = [call.output for call in acts.calls()]
    assert same([call.output for call in acts.calls()], on_cpu(seen))
    assert len(kept) == 20


def test_no_warning_hides_the_bodys_error():
    backend = Fake()
    backend.streams.refuse_after = 0
    model = RaisesHalfway()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="halfway"):
        warnings.simplefilter("error")
        with offloading(model, backend):
            model(torch.randn(1, 1, 9))


# -- a model that is on the device already


def test_offload_to_the_models_own_device_is_no_copy():
    model = AfterConv(lambda y: y)
    with torch.no_grad(), capture(model, offload="cpu") as acts:
        y = model(torch.randn(1, 2, 30))
    assert data_address(acts["conv"]) == data_address(y)


def test_offload_to_the_models_own_device_keeps_the_output_upstream_of_the_loss():
    model, x = FiveConvs(inplace=True), torch.randn(2, 1, 30)
    with capture(model, offload="cpu", detach=False) as acts:
        loss = model(x).square().sum()
    (found,) = torch.autograd.grad(loss, [acts["convs.4"]])
    y = acts["convs.4"].detach()
    assert same(found, 2 * y.relu())


def test_offload_to_the_models_own_device_leaves_copy_false_as_it_is():
    model = FiveConvs(inplace=True)
    with torch.no_grad(), capture(model, offload="cpu", copy=False) as acts:
        model(torch.randn(2, 1, 30))
    with pytest.raises(ModifiedInPlace):
        acts["convs.0"]


def test_a_cpu_model_touches_no_pinned_memory_and_no_stream(monkeypatch):
    monkeypatch.setattr(Transfers, "start", None)
    block = capture(FiveConvs(), offload="cpu")
    with block:
        block._options.model(torch.randn(1, 1, 30))
    assert not block._options.offloader._pool.total


def test_other_accelerators_get_a_plain_copy():
    streams = FakeStreams()
    streams.is_asynchronous = lambda tensor: False  # as on Apple's or Intel's devices
    found = Offloader("cpu", streams=streams).move(torch.ones(3))
    assert type(found) is Tensor
    assert not streams.copies
