"""The example of a ragged audio data set: what it claims holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import convtap
from convtap._dataset.extract import extract
from convtap._dataset.store import Store

EXAMPLE = Path(__file__).parent.parent / "examples" / "speech_features.py"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convtap, "extract", extract, raising=False)
        patch.setattr(convtap, "Store", Store, raising=False)
        spec = importlib.util.spec_from_file_location("speech_features", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def store(example, tmp_path_factory):
    return example.features(tmp_path_factory.mktemp("features"))


def test_the_store_holds_the_real_frames_of_every_sound(example, store):
    sounds = example.Tones()
    assert sorted(store.ids) == list(range(200))
    for i in (0, 57, 199):
        length = sounds.lengths[i]
        for kernel, stride in ((10, 5), (8, 4), (4, 2)):
            length = (length - kernel) // stride + 1
        assert store["convs.2"][i].shape == (64, length)
        assert store["convs.2"][i].dtype == torch.float16


def test_a_linear_probe_learns_the_class_from_the_store(example, store):
    torch.manual_seed(0)
    assert example.linear_probe(store, "convs.2", epochs=20) > 0.8  # chance is one half


def test_k_means_on_frames_leaves_less_than_one_center_does(example, store):
    one, eight = (example.distortion(store, "convs.2", example.kmeans(store, "convs.2", k, epochs=1)) for k in (1, 8))
    frames = torch.cat([row.T for row in store["convs.2"]]).float()
    assert one == pytest.approx((frames - frames.mean(0)).square().sum(1).mean().item(), rel=0.05)
    assert eight < 0.9 * one
