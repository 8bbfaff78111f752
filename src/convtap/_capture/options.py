"""The checked options of a capture, as one frozen object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convtap._errors import InvalidType, InvalidValue
from convtap._offload.offloader import Offloader
from convtap._record.policy import Policy
from convtap._record.reductions import Reduce, Reductions
from convtap._select.arguments import as_selection, check_arguments
from convtap._select.selection import CONV1D, Layers, Selection, Types, select
from convtap._taps.activations import check_activations
from convtap._tensors.memory import parse_bytes


@dataclass(frozen=True)
class CaptureOptions:
    """The checked options of a capture.

    Attributes:
        last: whether to keep only the last call of a layer.
        strict: whether a missing output on exit is an error (True) or a warning (False). None if the caller checks itself.

    The other attributes are the arguments of ``Capture``. ``policy`` holds ``detach``, ``copy``, ``reduce`` and ``dtype``.
    """

    model: nn.Module
    layers: Layers
    types: tuple[type[nn.Module], ...]
    at: str
    policy: Policy
    offloader: Offloader | None
    last: bool
    max_bytes: int | None
    grads: bool
    stop: bool
    activations: tuple[type[nn.Module], ...]
    functional: bool | None
    strict: bool | None
    every: int
    inputs: bool

    @property
    def has_rules_by_layer(self) -> bool:
        """Whether ``reduce`` is a mapping from layers to functions."""
        return isinstance(self.policy.reduce, Mapping)

    def reductions(self, selection: Selection) -> Reductions | None:
        """Returns the function of each layer if ``reduce`` is a mapping, else None."""
        return Reductions(self.policy.reduce, selection) if self.has_rules_by_layer else None

    def without_checks(self, policy: Policy | None = None) -> CaptureOptions:
        """Returns these options for a caller that itself checks for missing outputs.

        Args:
            policy: replaces the policy; None to keep it.
        """
        return dataclasses.replace(self, strict=None, policy=policy or self.policy)


def capture_options(
    model: nn.Module,
    layers: Layers = None,
    *,
    types: Types = CONV1D,
    at: str = "output",
    detach: bool = True,
    copy: bool = True,
    offload: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    reduce: Reduce | None = None,
    keep: str = "all",
    max_bytes: int | str | None = None,
    grads: bool = False,
    stop: bool = False,
    activations: Sequence[type[nn.Module]] = (),
    functional: bool | None = None,
    strict: bool = True,
    every: int = 1,
    inputs: bool = False,
) -> CaptureOptions:
    """Checks the arguments of ``Capture`` and returns them as one object.

    Raises:
        LayerNotFound: a selector, or an entry of ``reduce``, matches no layer.
        InvalidType, InvalidValue: an argument is invalid.
    """
    layers = as_selection(layers)
    types_asked = check_arguments(model, layers, types)
    for option, value in (("detach", detach), ("copy", copy), ("stop", stop), ("strict", strict), ("grads", grads)):
        check_choice(option, value, (True, False))
    check_choice("functional", functional, (None, True, False))
    check_choice("at", at, ("output", "input", "activation"))
    check_choice("keep", keep, ("all", "last"))
    if stop and layers is None:
        raise InvalidValue(
            "stop=True needs layers, since convtap cannot know which of all layers runs last. "
            "Write for example capture(model, 'encoder.conv3', stop=True)."
        )
    check_choice("inputs", inputs, (True, False))
    if inputs and at != "output":
        raise InvalidValue(
            f"inputs=True does not work with at={at!r}, since it keeps an input with each layer's output. Remove at={at!r}."
        )
    if grads and at == "input":
        raise InvalidValue(
            "grads=True does not work with at='input', since it records gradients of outputs. Remove at='input', or capture "
            "with detach=False and call torch.autograd.grad(loss, acts[name])."
        )
    kinds = check_activations(activations)
    if kinds and at != "activation":
        raise InvalidValue(f"activations= has no effect with at={at!r}. Write at='activation'.")
    options = CaptureOptions(
        model=model,
        layers=layers,
        types=types_asked,
        at=at,
        policy=Policy(detach=detach, copy=copy, reduce=reduce, dtype=dtype),
        offloader=None if offload is None else Offloader(offload),
        last=keep == "last",
        max_bytes=None if max_bytes is None else parse_bytes(max_bytes, "max_bytes"),
        grads=grads,
        stop=stop,
        activations=kinds,
        functional=functional,
        strict=strict,
        every=check_every(every),
        inputs=inputs,
    )
    if layers is not None or options.has_rules_by_layer:  # a wrong name fails here, at the user's line
        options.reductions(select(model, layers, types_asked))
    return options


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Checks that an argument has one of its possible values.

    Raises:
        InvalidValue: it has another value.
    """
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise InvalidValue(f"{name}={value!r} is invalid. Pass one of {', '.join(map(repr, choices))}.")


def check_every(every: Any) -> int:
    """Checks the option ``every`` and returns it.

    Raises:
        InvalidType, InvalidValue: it is not a positive int.
    """
    if isinstance(every, bool) or not isinstance(every, int):
        raise InvalidType(f"every is a {type(every).__name__}. Pass an int: every=100 for passes 0, 100, 200, ….")
    if every < 1:
        raise InvalidValue(
            f"every={every} selects no forward pass. Pass 1 for all, or every=100 for passes 0, 100, 200, …."
        )
    return every
