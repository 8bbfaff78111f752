"""The gallery's reference is right and sees every way to call a convolution, and the page has each model."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import capture
from gallery.check import differences, reason
from gallery.reference import convolutions
from gallery.run import COLUMNS, MODELS, PAGE, TEXT, page

X = torch.randn(2, 4, 41)


def table() -> list[dict[str, str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [dict(zip(COLUMNS, re.split(r" \| ", line.strip("| ")), strict=True)) for line in lines[2:]]


def test_the_page_has_a_row_for_each_model():
    assert [row["package"].split()[0] for row in table()] == [name.replace("_", "-") for name in MODELS]


def test_each_row_has_every_convolution_captured_or_says_why_not():
    for row in table():
        if row["captured"] != "–":
            assert row["captured"] == row["convolutions"] or "(" in row["captured"], row
        else:
            assert ":" in row["model and input"], row  # the error


def test_the_page_has_the_text_of_its_script():
    before, rest = TEXT.split("{table}")
    text = PAGE.read_text()
    assert text.startswith(before)
    assert rest.split("{versions}")[0] in text


def test_the_page_shows_an_error_and_a_missing_convolution():
    good = {"title": "T", "layers": 2, "via": ["module"], "convolutions": 2, "captured": 1, "difference": 1e-7}
    good |= {"milliseconds": 1.0, "ratio": 1.1, "reason": reason(1, 2, 1, ["'b' did not run"])}
    text = page([{"package": "a", "error": "ImportError: no b"}, good | {"package": "c", "version": "1"}])
    assert "| a | ImportError: no b | – |" in text
    assert "| c 1 | T | 2 | module | 2 | 1 (1 calls captured, 1 of them right; 'b' did not run) |" in text


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 3, "padding": 2},
        {"dilation": 3, "bias": False},
        {"groups": 2, "stride": 2, "dilation": 2, "padding": 1},
        {"padding": "same", "dilation": 3},
        {"padding": "valid", "groups": 4},
        {"padding": 2, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_the_value_by_hand_is_the_convolution(mode, options):
    conv = nn.Conv1d(4, 8, 5, **options)
    with mode():
        (seen,) = convolutions(lambda: conv(X))
        assert torch.equal(seen.output, conv(X))
    torch.testing.assert_close(seen.by_hand(), conv(X).double(), rtol=1e-5, atol=1e-5)


def test_modules_functions_and_torchscript_are_counted_and_others_are_not():
    conv, script = nn.Conv1d(4, 4, 3), torch.jit.script(nn.Conv1d(4, 4, 3))

    def run():
        F.conv_transpose1d(F.conv1d(script(conv(X)), conv.weight), conv.weight)
        F.conv2d(X[:, None], torch.randn(1, 1, 3, 3))

    assert len(convolutions(run)) == 3


def test_a_missing_or_wrong_value_is_not_counted_as_captured():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)).eval()
    with torch.no_grad(), capture(model) as acts:
        model(X)
    expected = [seen.by_hand() for seen in convolutions(lambda: model(X))]
    assert len(differences(acts.calls(), expected)) == 3
    assert len(differences(acts.calls()[:1] + acts.calls()[2:], expected)) == 2
    assert len(differences(acts.calls(), [expected[0], expected[1] + 0.01, expected[2]])) == 2
    assert differences([], expected) == []
    assert reason(3, 3, 3, []) == ""
