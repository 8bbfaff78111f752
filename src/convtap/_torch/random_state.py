"""Reads and sets the states of torch's random-number generators."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state() -> list[Tensor]:
    """Returns the states of the generators of the CPU and of CUDA, if it is in use."""
    states = [torch.get_rng_state()]
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return states + (torch.cuda.get_rng_state_all() if on_cuda else [])


def set_random_state(states: list[Tensor]) -> None:
    """Sets the states that ``random_state`` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
