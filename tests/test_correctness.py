"""The cases of the correctness table hold for convtap, and can fail: the hook idiom fails those that it is known to."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import CASES, Wrong, inplace_relu, raises, three_calls, two_passes
from benchmarks.libraries import convtap, raw_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_convtap_agrees_with_the_reference(case):
    torch.compiler.reset()
    case(convtap)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (inplace_relu, "another value"),
        (three_calls, "1 of 3 calls"),
        (two_passes, "1 of 2 calls"),
        (raises, "hooks left"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_hook_idiom_is_found_wrong_where_it_is(case, how):
    with pytest.raises(Wrong, match=how):
        case(raw_hooks)
