"""The training-loop example writes what it says, and its memory is flat."""

import gc
import tracemalloc

import pytest
import torch

from examples import training_loop as example


class Writer:
    """What a SummaryWriter is asked to do; at every loss, what is alive."""

    def __init__(self):
        self.scalars, self.histograms, self.alive = {}, {}, []

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.scalars.setdefault(tag, []).append((step, value))
        if tag == "loss" and tracemalloc.is_tracing():
            gc.collect()
            tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
            self.alive.append((len(tensors), sum(t.nbytes for t in tensors), tracemalloc.get_traced_memory()[0]))

    def add_histogram(self, tag, values, step):
        self.histograms.setdefault(tag, []).append((step, tuple(values.shape)))


def test_statistics_come_every_few_steps_and_are_those_of_the_last_output():
    writer = Writer()
    example.train(writer, steps=21, every=10, batch=4, samples=64)
    layers = ("0", "3")
    assert sorted(writer.histograms) == [f"{layer}/output" for layer in layers]
    assert writer.histograms["3/output"] == [(step, (4, 16, 16)) for step in (0, 10, 20)]
    for layer in layers:
        for what in ("mean", "std", "dead channels", "gradient norm"):
            assert [step for step, _ in writer.scalars[f"{layer}/{what}"]] == [0, 10, 20]
            assert all(value > 0 or what in ("mean", "dead channels") for _, value in writer.scalars[f"{layer}/{what}"])


def test_training_with_the_block_open_is_training_without_it(monkeypatch):
    watched = example.train(Writer(), steps=12, every=5, batch=4, samples=64)
    monkeypatch.setattr(example, "write", lambda *_: None)
    monkeypatch.setattr(example, "capture", lambda model, **_: _Nothing())
    plain = example.train(Writer(), steps=12, every=5, batch=4, samples=64)
    for ours, theirs in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def clear(self):
        pass


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_memory_is_flat_over_a_thousand_steps(traced):
    writer = Writer()
    example.train(writer, steps=1001, every=100, batch=2, samples=32)
    (early, *_, late) = writer.alive[2:]
    assert len(writer.alive) == 11
    assert late[0] <= early[0] + 2
    assert late[1] <= early[1] + 1000
    assert (
        late[2] <= early[2] + 60_000
    )  # Python objects, 25 kB of them what the writer here keeps; 200 bytes a step would show
