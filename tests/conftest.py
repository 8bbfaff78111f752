"""What all tests share: one thread, a fixed seed, and a torchvision that imports over a CPU build of torch."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.harness import declare_torchvision_operators

torch.set_num_threads(1)


declare_torchvision_operators()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_gc():
    """Turns the cycle collector off: what is freed then is freed by its reference count alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
