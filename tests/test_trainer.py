"""The callback of the Hugging Face Trainer writes the histograms of the outputs, and leaves nothing on the model."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from convtap._torch.modes import open_tokens
from examples import trainer_histograms as example
from tests.histograms import assert_histograms_are_of, recording, written
from tests.reference import snapshot_of

QUIET = {"disable_tqdm": True, "logging_strategy": "no"}


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    monkeypatch.setattr(example, "Classifier", recording(example.Classifier, "encoder"))


def nothing_is_left(model):
    assert snapshot_of(model.encoder) == snapshot_of(type(model)().encoder)
    assert open_tokens() == ()


def test_histograms_are_those_of_the_outputs_in_every_nth_step(tmp_path):
    model = example.train(tmp_path, steps=13, every=5, **QUIET)
    assert len(model.passes) == 13
    assert_histograms_are_of(tmp_path, "encoder", [(step, model.passes[step]) for step in (0, 5, 10)])
    nothing_is_left(model)


def test_the_callback_does_not_change_the_training(tmp_path, monkeypatch):
    watched = example.train(tmp_path / "watched", steps=8, every=1, **QUIET)
    monkeypatch.setattr(example, "Histograms", lambda *_: TrainerCallback())
    plain = example.train(tmp_path / "plain", steps=8, **QUIET)
    assert len(written(tmp_path / "watched")["encoder.0"]) == 8
    assert written(tmp_path / "plain") == {}
    for ours, theirs in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_of_accumulated_batches_the_last_one_is_written(tmp_path):
    model = example.train(tmp_path, steps=5, every=2, gradient_accumulation_steps=3, **QUIET)
    assert len(model.passes) == 15
    assert_histograms_are_of(tmp_path, "encoder", [(step, model.passes[3 * step + 2]) for step in (0, 2, 4)])
    nothing_is_left(model)


def test_a_step_that_raises_leaves_nothing_on_the_model(tmp_path, monkeypatch):
    models, callbacks = [], []

    class Kept(example.Histograms):
        def __init__(self, *args):
            super().__init__(*args)
            callbacks.append(self)  # as in a notebook, where the trainer stays

    class Fails(example.Classifier):
        fails_at = 2

        def __init__(self):
            super().__init__()
            models.append(self)

    monkeypatch.setattr(example, "Histograms", Kept)
    monkeypatch.setattr(example, "Classifier", Fails)
    with pytest.raises(RuntimeError, match="^halfway$"):
        example.train(tmp_path, steps=5, every=2, **QUIET)
    assert len(models[0].passes) == 3
    nothing_is_left(models[0])


def test_outputs_that_are_all_nan_do_not_end_the_training(tmp_path, monkeypatch):
    class Diverged(example.Classifier):
        def __init__(self):
            super().__init__()
            torch.nn.init.constant_(self.encoder[2].bias, torch.nan)

    monkeypatch.setattr(example, "Classifier", Diverged)
    model = example.train(tmp_path, steps=2, every=1, **QUIET)
    assert len(model.passes) == 2
    assert written(tmp_path)["encoder.0"][0][0] == 0
    assert "encoder.2" not in written(tmp_path)


def test_the_page_shows_the_callback_of_the_example():
    assert inspect.getsource(example.Histograms) in (Path(__file__).parent.parent / "docs/training.md").read_text()
