"""Runs a model once on an example, without leaving a trace on it: mode, running statistics, random-number state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convtap._errors import InvalidType, InvalidValue, did_you_mean, listed
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
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and every module back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_once(model: nn.Module, example: Any, method: str | None = None) -> Any:
    """Runs a model, or a method of it, on an example in eval mode, without gradients, and returns its output."""
    args, kwargs = arguments(example)
    run = entry(model, method)
    with eval_mode(model), torch.random.fork_rng(), torch.no_grad():
        return run(*args, **kwargs)


def entry(model: nn.Module, method: Any) -> Callable[..., Any]:
    """Returns what is called to run a model: the model itself, or the method of that name.

    Raises:
        InvalidType: ``method`` is not a str.
        InvalidValue: the model has no such method.
    """
    if method is None or method == "forward":
        return model
    if not isinstance(method, str):
        raise InvalidType(f"method is a {type(method).__name__}. Pass the name of a method: method='encode'.")
    found = getattr(model, method, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    kind = type(getattr(model, "_orig_mod", model))
    own = [
        name for name in dir(kind) if name not in dir(nn.Module) and name[0] != "_" and callable(getattr(kind, name))
    ]
    raise InvalidValue(
        f"method={method!r} names no method of {kind.__name__}.{did_you_mean(method, own)} Its methods are: "
        f"{listed(['forward', *own])}."
    )


def fitted(example: Any, model: nn.Module) -> Any:
    """Gives a model an example in the model's own floating type, and on its device."""
    arguments(example)
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_leaves(fit, example, other=lambda value: value) if tensors else example
