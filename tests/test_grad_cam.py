"""The Grad-CAM example does what it says: the relevance falls on the beat that was planted."""

import pytest
import torch

from examples import grad_cam_1d as example


@pytest.fixture(scope="module")
def trained():
    return example.train()


@pytest.fixture(scope="module")
def abnormal():
    """Signals that the network was not trained on, each with a wide beat, and where that is."""
    x, labels, centres = example.signals(100, torch.Generator().manual_seed(3))
    return x[labels == 1], centres[labels == 1]


def share_on_the_beat(relevance, centres):
    frames = torch.arange(relevance.shape[1]) * example.STRIDE
    inside = (frames - centres[:, None]).abs() <= example.SPACING / 2
    return (relevance * inside).sum(1) / relevance.sum(1).clamp(min=1e-12)


def test_the_relevance_falls_on_the_planted_beat(trained, abnormal):
    x, centres = abnormal
    assert (trained(x).argmax(1) == 1).float().mean() > 0.95
    relevance = example.grad_cam(trained, x, layer="4", target=1)
    assert relevance.shape == (50, example.SAMPLES // example.STRIDE)
    assert share_on_the_beat(relevance, centres).mean() > 0.9  # one fifth would be chance
    peak = relevance.argmax(1) * example.STRIDE
    assert ((peak - centres).abs() <= example.SPACING / 2).float().mean() > 0.95


def test_an_untrained_network_does_not_know_the_beat(abnormal):
    torch.manual_seed(0)
    x, centres = abnormal
    relevance = example.grad_cam(example.network().eval(), x, layer="4", target=1)
    assert share_on_the_beat(relevance, centres).mean() < 0.7


def test_it_is_grad_cam_as_computed_by_hand(trained, abnormal):
    x, _ = abnormal
    output = trained[:5](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(trained[6:](output.relu())[:, 1].sum(), output)
    expected = (gradient.mean(2)[:, :, None] * output.clamp(min=0)).sum(1).clamp(min=0)
    torch.testing.assert_close(example.grad_cam(trained, x, "4", 1), expected.detach())


def test_the_picture_is_drawn(trained, abnormal, tmp_path):
    x, centres = abnormal
    relevance = example.grad_cam(trained, x[:1], "4", 1)
    example.draw(x[0, 0], relevance[0], int(centres[0]), tmp_path / "cam.png")
    assert (tmp_path / "cam.png").read_bytes()[:4] == b"\x89PNG"
