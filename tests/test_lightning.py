"""The Lightning callback writes the histograms of the outputs in the steps that it names, and leaves nothing on the model."""

from __future__ import annotations

import inspect
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from convtap._torch.modes import open_tokens
from examples import lightning_histograms as example
from tests.histograms import assert_histograms_are_of, recording, written
from tests.reference import snapshot_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # Lightning calls what torch deprecates
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    monkeypatch.setattr(example, "Classifier", recording(example.Classifier, "net"))


def nothing_is_left(model):
    assert snapshot_of(model.net) == snapshot_of(type(model)().net)
    assert open_tokens() == ()


def test_histograms_are_those_of_the_outputs_in_every_nth_step(tmp_path):
    model = example.train(tmp_path, steps=13, every=5)
    assert len(model.passes) == 13
    assert_histograms_are_of(tmp_path, "net", [(step, model.passes[step]) for step in (0, 5, 10)])
    nothing_is_left(model)


def test_the_callback_does_not_change_the_training(tmp_path, monkeypatch):
    watched = example.train(tmp_path / "watched", steps=8, every=1)
    monkeypatch.setattr(example, "Histograms", lambda every: lightning.Callback())
    plain = example.train(tmp_path / "plain", steps=8)
    assert len(written(tmp_path / "watched")["net.0"]) == 8
    assert written(tmp_path / "plain") == {}
    for ours, theirs in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_model_is_as_it_was_in_all_other_steps(tmp_path):
    seen, clean = [], snapshot_of(example.Classifier().net)

    class Look(lightning.Callback):
        def on_before_backward(self, trainer, module, loss):
            is_clean = snapshot_of(module.net) == clean and open_tokens() == ()
            seen.append((trainer.global_step, is_clean))

    example.train(tmp_path, steps=6, every=3, callbacks=[Look()])
    assert seen == [(step, step % 3 != 0) for step in range(6)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_step_that_raises_leaves_nothing_on_the_model(tmp_path, monkeypatch, error):
    models = []

    class Fails(example.Classifier):
        def training_step(self, batch, batch_idx):
            models.append(self)
            super().training_step(batch, batch_idx)
            raise error("halfway")

    monkeypatch.setattr(example, "Classifier", Fails)
    with pytest.raises((error, SystemExit)) as raised:  # Lightning ends the process with 1 where it was interrupted
        example.train(tmp_path, steps=2)
    assert raised.type is SystemExit or str(raised.value) == "halfway"
    nothing_is_left(models[0])


def test_accumulated_batches_are_one_step_and_validation_is_none(tmp_path):
    class Validated(example.Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    model, data = Validated(), DataLoader(example.signals(64), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=2,
        log_every_n_steps=1,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[example.Histograms(every=3)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data, data)
    assert trainer.global_step == 8
    assert_histograms_are_of(tmp_path, "net", [(step, model.passes[2 * step]) for step in (0, 3, 6)])
    nothing_is_left(model)


def test_outputs_that_are_all_nan_do_not_end_the_training(tmp_path, monkeypatch):
    class Diverged(example.Classifier):
        def __init__(self):
            super().__init__()
            torch.nn.init.constant_(self.net[2].bias, torch.nan)

    monkeypatch.setattr(example, "Classifier", Diverged)
    model = example.train(tmp_path, steps=2, every=1)
    assert len(model.passes) == 2
    assert written(tmp_path)["net.0"][0][0] == 0
    assert "net.2" not in written(tmp_path)


def test_the_page_shows_the_callback_of_the_example():
    assert inspect.getsource(example.Histograms) in (Path(__file__).parent.parent / "docs/training.md").read_text()
