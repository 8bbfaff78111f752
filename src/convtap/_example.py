"""Runs a model once on an example, without leaving a trace on it: mode, running statistics, random-number state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convtap._errors import InvalidType
from convtap._structure import map_leaves

#: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
Example: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits an example into what the model is called with.

    Raises:
        InvalidType: it is neither a tensor, a tuple nor a dict.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict):
        return (), dict(example)
    raise InvalidType(
        f"example is a {type(example).__name__}. Pass a tensor, a tuple of positional arguments, or a dict of keyword "
        "arguments: example=torch.zeros(1, 1, 16000)."
    )


@contextmanager
def eval_mode(model: nn.Module, mode: str | None = "eval") -> Iterator[None]:
    """Puts a model into eval mode, and every module back into the mode it was in.

    Args:
        mode: ``"train"`` for train mode, None to leave each module's mode. In these, buffers get their values back.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [] if mode == "eval" else [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        if mode is not None:
            model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def run_once(model: nn.Module, example: Any, mode: str | None = "eval") -> Any:
    """Runs a model on an example in a mode, without gradients, and returns its output."""
    args, kwargs = arguments(example)
    with eval_mode(model, mode), torch.random.fork_rng(), torch.no_grad():
        return model(*args, **kwargs)


def fitted(example: Any, model: nn.Module) -> Any:
    """Gives a model an example in the model's own floating type, and on its device."""
    arguments(example)
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_leaves(fit, example, other=lambda value: value) if tensors else example
