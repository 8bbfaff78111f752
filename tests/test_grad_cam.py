"""The Grad-CAM example does what it says: the relevance falls on the beat that was planted."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import timeline
from examples import grad_cam_1d as example

STRIDE = 8  # three convolutions of stride 2


@pytest.fixture(scope="module")
def trained():
    return example.train()


@pytest.fixture(scope="module")
def abnormal():
    """Signals that the network was not trained on, each with a wide beat, and where that is."""
    x, labels, centres = example.signals(100, torch.Generator().manual_seed(3))
    return x[labels == 1], centres[labels == 1]


def share_on_the_beat(relevance, centres):
    frames = torch.arange(relevance.shape[1]) * STRIDE
    inside = (frames - centres[:, None]).abs() <= example.SPACING / 2
    return (relevance * inside).sum(1) / relevance.sum(1).clamp(min=1e-12)


def test_the_relevance_falls_on_the_planted_beat(trained, abnormal):
    x, centres = abnormal
    assert (trained(x).argmax(1) == 1).float().mean() > 0.95
    relevance = example.grad_cam(trained, x, layer="4", target=1)
    assert relevance.shape == (50, example.SAMPLES // STRIDE)
    assert share_on_the_beat(relevance, centres).mean() > 0.9  # one fifth would be chance
    peak = relevance.argmax(1) * STRIDE
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


def test_the_highest_sample_is_on_the_planted_beat(trained, abnormal):
    x, centres = abnormal
    relevance = example.grad_cam(trained, x, "4", 1)
    found = example.on_samples(relevance, timeline(trained, x[:1])["4"], example.SAMPLES)
    assert found.shape == (50, example.SAMPLES)
    after = found.argmax(1) - centres
    # a wide beat (standard deviation 9) and its inverted second wave (28 later, standard deviation 8), two of these each way
    assert ((after >= -18) & (after <= 28 + 16)).float().mean() > 0.95
    inside = (torch.arange(example.SAMPLES) - centres[:, None]).abs() <= example.SPACING / 2
    assert ((found * inside).sum(1) / found.sum(1)).mean() > 0.9


def test_frames_lie_at_their_centres_with_straight_lines_between(trained, abnormal):
    relevance = example.grad_cam(trained, abnormal[0][:4], "4", 1)
    found = example.on_samples(relevance, timeline(trained, abnormal[0][:1])["4"], example.SAMPLES)
    # odd kernels, half of each padded: frame t has its centre at sample 8 t, and sees 7 + 4 * 2 + 2 * 4 on each side
    places = [-24, *range(0, 512, 8), 504 + 24]
    expected = [np.interp(np.arange(512), places, [0, *row, 0]) for row in relevance.numpy()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [0, 48])
def test_each_frame_lies_amid_the_samples_that_reach_it(left):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConstantPad1d((left, 0), 0.0), nn.Conv1d(1, 4, 17, stride=4), nn.Conv1d(4, 1, 9, stride=2))
    x = torch.randn(1, 1, 203, requires_grad=True)
    output, layer = model(x), timeline(model, x.detach())["2"]
    stretched = []
    for frame in range(output.shape[-1]):
        (gradient,) = torch.autograd.grad(output[0, 0, frame], x, retain_graph=True)
        seen = gradient[0, 0].nonzero().flatten()
        one = F.one_hot(torch.tensor([frame]), output.shape[-1]).float()
        found = example.on_samples(one, layer, 203)[0]
        if len(seen) == 49:  # 17 + 8 * 4, none of them padding
            assert int(found.argmax()) == int(seen[0]) + 24
            whole = F.interpolate(one[None], size=203, mode="linear")[0, 0]
            stretched.append(abs(int(whole.argmax()) - int(found.argmax())))
    assert max(stretched) > layer.stride  # what the timeline is for


def test_samples_past_the_last_frame_have_no_relevance():
    model = nn.Sequential(nn.Conv1d(1, 1, 5, stride=10))
    found = example.on_samples(torch.ones(1, 10), timeline(model, torch.zeros(1, 1, 99))["0"], 99)[0]
    assert found.tolist() == pytest.approx([1 / 3, 2 / 3] + [1] * 91 + [2 / 3, 1 / 3] + [0] * 4)


def test_without_matplotlib_the_numbers_are_printed_and_no_picture(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "train", lambda: trained)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    example.main(tmp_path / "cam.png")
    printed = capsys.readouterr().out
    assert "no picture: matplotlib is not installed" in printed
    assert -18 <= int(printed.split("the highest is ")[1].split()[0]) <= 44
    assert not (tmp_path / "cam.png").exists()


def test_the_picture_is_drawn(trained, abnormal, tmp_path):
    x, centres = abnormal
    relevance = example.on_samples(example.grad_cam(trained, x[:1], "4", 1), timeline(trained, x[:1])["4"], 512)
    example.draw(x[0, 0], relevance[0], int(centres[0]), tmp_path / "cam.png")
    assert (tmp_path / "cam.png").read_bytes()[:4] == b"\x89PNG"
