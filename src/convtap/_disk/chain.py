"""How many frames of each layer are real, from how many samples of the input are: asked of the model's timeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported
from convtap._time.timeline import Timeline, timeline


class ValidLengths:
    """The rule of each layer, found by following the time axis of the first batch through the model."""

    def __init__(self, model: nn.Module, time_dim: int = -1) -> None:
        self._model = model
        self._time_dim = time_dim
        self._times: Timeline | None = None
        self._counts: dict[tuple[str, int], int] = {}

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows a first batch through the model; later ones need no look."""
        if self._times is None:
            self._times = timeline(self._model, _example(self._model, args, kwargs), time_dim=self._time_dim)

    @property
    def times(self) -> Timeline | None:
        """The timeline of the first batch, once it was followed."""
        return self._times

    def axis_or_none(self, layer: str, path: str) -> int | None:
        """Returns which axis of a layer's tensor is time, counted from the end, or None if it is not known or none is."""
        if self._times is None or layer not in self._times:
            return None
        runs = self._times.calls(layer)
        dims = {one.dim if one.unknown is None and one.path == path else None for one in runs}
        return dims.pop() if len(dims) == 1 else None

    def frames(self, layer: str, length: int) -> int:
        """Returns how many frames of a layer are real for an input of ``length`` samples.

        Raises:
            Unsupported: nobody knows.
        """
        found = self._counts.get((layer, length))
        if found is None:
            found = self._counts[layer, length] = int(self._ask(layer, lambda time: time.frames_of(length)))
        return found

    def axis(self, layer: str) -> int:
        """Returns which axis of a layer's output is time, counted from the end (-1 for (B, C, T))."""
        dim = self._ask(layer, lambda time: time.dim)
        if dim is None:
            raise Unsupported(_unknown(layer, "its output has no time axis"))
        return int(dim)

    def check(self, layer: str, full: int, seen: int) -> None:
        """Compares the rule with what was seen for a padded batch of ``full`` samples.

        Raises:
            Unsupported: they differ.
        """
        expected = self.frames(layer, full)
        if expected != seen:
            raise Unsupported(
                _unknown(layer, f"for {full} input samples it gave {seen} frames, and its geometry gives {expected}")
            )

    def _ask(self, layer: str, question: Callable[[Any], Any]) -> Any:
        assert self._times is not None
        try:
            return question(self._times[layer])
        except ConvtapError as error:
            raise Unsupported(_unknown(layer, str(error))) from error


def _example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Writes a call as an example: a tuple or a dict; a call with both becomes a dict by the names of the forward."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        by_name = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
    except (TypeError, ValueError) as error:
        raise Unsupported(f"lengths= needs inputs that can all be given by keyword: {error}.") from error
    return by_name


def _unknown(layer: str, why: str) -> str:
    return (
        f"lengths= needs the number of real frames of {layer!r}, and it is not known: {why.rstrip('.')}. Leave the layer "
        "out, or extract without lengths= and cut the rows yourself."
    )


def checked_lengths(lengths: Callable[[Any], Any], batch: Any, size: int, full: int) -> list[int]:
    """Calls the user's ``lengths`` on a batch, and checks what it returns: one number of input samples a row.

    Raises:
        InvalidType: it is not a sequence of ints.
        InvalidValue: there are more or fewer than rows, or one is longer than the padded input.
    """
    found = lengths(batch)
    try:
        values = torch.as_tensor(found).reshape(-1)
        good = not values.is_floating_point() and values.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise InvalidType(
            f"lengths(batch) returned a {type(found).__name__} that is no sequence of ints. Return one number of input "
            "samples for each row, such as batch['attention_mask'].sum(1)."
        )
    numbers: list[int] = values.tolist()
    if len(numbers) != size:
        raise InvalidValue(f"lengths(batch) returned {len(numbers)} lengths for {size} rows. Return one for each row.")
    for number in numbers:
        if not 0 <= number <= full:
            raise InvalidValue(
                f"lengths(batch) returned {number}, and the padded input has {full} samples: a row's length lies between."
            )
    return numbers
