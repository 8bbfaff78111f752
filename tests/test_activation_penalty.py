"""The penalty of captured activations has the gradients of a model that is rewritten by hand to return them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convtap import tapped
from convtap._torch.modes import open_tokens
from examples import activation_penalty as example
from tests.reference import snapshot_of


def rewritten(model, x):
    """The example's network with functions: the logits and both activations."""
    first = F.conv1d(x, model[0].weight, model[0].bias, stride=2, padding=3).relu()
    second = F.conv1d(first, model[2].weight, model[2].bias, stride=2, padding=2).relu()
    return F.linear(second.mean(-1), model[6].weight, model[6].bias), first, second


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_loss_and_its_gradients_are_those_of_the_model_rewritten_by_hand(strength):
    model = example.network().double()
    x, labels = example.signals(8, torch.Generator().manual_seed(3))
    x = x.double().requires_grad_()
    before = snapshot_of(model)
    loss = example.penalized_loss(model, x, labels, strength)
    logits, *activations = rewritten(model, x)
    expected = F.cross_entropy(logits, labels) + strength * sum(a.sum() / a.numel() for a in activations)
    inputs = [x, *model.parameters()]
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert snapshot_of(model) == before
    assert open_tokens() == ()


def test_the_penalty_alone_has_a_gradient_in_every_layer_before_an_activation():
    model = example.network()
    x, labels = example.signals(8, torch.Generator().manual_seed(3))
    grads = []
    for strength in (0.0, 1.0):
        grads.append(torch.autograd.grad(example.penalized_loss(model, x, labels, strength), list(model.parameters())))
    moved = [not torch.equal(without, with_it) for without, with_it in zip(*grads, strict=True)]
    assert moved == [True] * 4 + [False] * 2  # the classifier comes after the last activation


def test_a_compiled_tapped_model_has_the_same_loss_and_gradients():
    model = example.network()
    x, labels = example.signals(8, torch.Generator().manual_seed(3))
    both = torch.compile(tapped(model, types=torch.nn.ReLU), fullgraph=True, backend="aot_eager")
    logits, activations = both(x)
    loss = F.cross_entropy(logits, labels) + 0.3 * sum(output.abs().mean() for output in activations.values())
    expected = example.penalized_loss(model, x, labels, 0.3)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_measured_zeros_are_those_of_the_activations():
    model = example.train(0.5, steps=5)
    x, labels = example.signals(500, torch.Generator().manual_seed(1))
    logits, *activations = rewritten(model, x)
    accuracy, zeros = example.measure(model)
    assert accuracy == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert list(zeros.values()) == pytest.approx([float((a == 0).double().mean()) for a in activations], abs=1e-4)


def test_the_penalty_makes_activations_rare_at_the_same_accuracy(capsys):
    example.main()
    plain, penalized = capsys.readouterr().out.splitlines()
    assert plain.startswith("penalty 0.0: accuracy 100.0%")
    assert penalized.startswith("penalty 1.0: accuracy 100.0%")
    shares = [[int(part.split("%")[0].split()[-1]) for part in line.split("layer ")[1:]] for line in (plain, penalized)]
    assert max(shares[0]) < 70
    assert min(shares[1]) > 85
