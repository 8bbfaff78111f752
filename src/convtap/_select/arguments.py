"""Checks the types of the arguments that select layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from convtap._errors import InvalidType, InvalidValue, Unsupported
from convtap._select.module_tree import is_keras


def as_selection(layers: Any) -> Any:
    """Returns a selection that can be read more than once.

    An iterator, such as a generator, becomes a list.
    """
    return list(layers) if isinstance(layers, Iterator) else layers


def check_arguments(
    model: Any,
    layers: Any,
    types: Any,
    instead: str = "run the model inside: with capture(model) as acts: model(x)",
) -> tuple[type[nn.Module], ...]:
    """Checks the types of the arguments. Returns ``types`` as a tuple.

    Args:
        model: the model.
        layers: the selection.
        types: one module type, or several.
        instead: the advice for a user who passed an input as ``layers``.

    Raises:
        InvalidType: if ``model`` is not a module, ``layers`` is an input, or ``types`` holds a value other than a module type.
    """
    if not isinstance(model, nn.Module):
        if is_keras(type(model)):
            raise Unsupported(
                "this Keras model runs on another backend than torch, so PyTorch never sees its convolutions. Set the "
                "environment variable KERAS_BACKEND=torch before keras is imported, then build the model."
            )
        raise InvalidType(
            f"the first argument is a {type(model).__name__}, not a torch.nn.Module. "
            "Write: with capture(model) as acts: model(x)"
        )
    if isinstance(layers, (bytes, bytearray)):
        raise InvalidType(f"layers is {layers!r}, but a name must be text. Write {layers.decode(errors='replace')!r}.")
    if isinstance(layers, (torch.Tensor, dict)) or (hasattr(layers, "__array__") and bool(getattr(layers, "ndim", 0))):
        advice = instead[:1].upper() + instead[1:]
        raise InvalidType(f"the second argument is a {type(layers).__name__}, but it must select layers. {advice}")
    kinds = tuple(types) if isinstance(types, (list, tuple, set, frozenset)) else (types,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            example = "keras.layers.Conv2D" if is_keras(type(model)) else "nn.Conv2d"
            raise InvalidType(f"types holds {kind!r}, which is not a module type. Pass for example types={example}.")
    if not kinds:
        raise InvalidValue("types is empty, so nothing could be captured. Omit types to select Conv1d.")
    return kinds
