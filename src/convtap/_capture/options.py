"""The options of a capture, checked, in one frozen object."""

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
    """The options of a capture, checked.

    Attributes:
        last: keep only the last call of a layer.
        strict: whether what is missing on exit is an error (True) or a warning (False). None: the caller looks itself.

    The others are the arguments of ``Capture``; ``policy`` holds ``detach``, ``copy``, ``reduce`` and ``dtype``.
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
        """Returns the function of each layer, if ``reduce`` is a mapping from layers to functions."""
        return Reductions(self.policy.reduce, selection) if self.has_rules_by_layer else None

    def without_checks(self, policy: Policy | None = None) -> CaptureOptions:
        """Returns these options for a caller that looks itself at what is missing, with another policy if it has one."""
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
    """Checks the arguments of ``Capture``, which describes them, and returns them as one object.

    Raises:
        LayerNotFound: a selector, or an entry of ``reduce``, matches nothing.
        InvalidType, InvalidValue: an argument cannot be used.
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
            "stop=True needs layers: without them nobody can say which layer is the last. "
            "Write for example capture(model, 'encoder.conv3', stop=True)."
        )
    check_choice("inputs", inputs, (True, False))
    if inputs and at != "output":
        raise InvalidValue(
            f"inputs=True keeps the input beside each output, and at={at!r} captures no outputs of the layers. Leave at= out."
        )
    if grads and at == "input":
        raise InvalidValue(
            "grads=True collects gradients of outputs, and at='input' captures none. Leave at= out, or capture "
            "with detach=False and take torch.autograd.grad(loss, acts[name])."
        )
    kinds = check_activations(activations)
    if kinds and at != "activation":
        raise InvalidValue(f"activations= says what counts as one with at='activation', and at is {at!r}.")
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
    if layers is not None or options.has_rules_by_layer:  # a wrong name is an error here, where it was written
        options.reductions(select(model, layers, types_asked))
    return options


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Checks that an argument is one of the values that it may have.

    Raises:
        InvalidValue: it is another one.
    """
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise InvalidValue(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")


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
