"""What all tests share: one thread, a fixed seed, and a torchvision that imports over a CPU build of torch."""

from __future__ import annotations

import gc
import importlib.util

import pytest
import torch

torch.set_num_threads(1)


def declare_torchvision_operators() -> None:
    """Declares the two operators that torchvision's Python part expects and its wheel for CUDA brings compiled."""
    if importlib.util.find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    _kept.append(library)


_kept: list[object] = []
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
