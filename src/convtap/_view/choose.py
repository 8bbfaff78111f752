"""Which captured calls, and which of the inputs, a picture is of."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from convtap._errors import (
    InvalidType,
    InvalidValue,
    LayerNotFound,
    NotCaptured,
    OutOfRange,
    did_you_mean,
    listed,
    plural,
)
from convtap._result.activations import Activations, log_of
from convtap._result.call import Call
from convtap._result.samples import Samples

Chosen: TypeAlias = "str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None"


def pass_of(acts: Activations, sample: int) -> tuple[int, Any]:
    """The forward pass that had an input in it, and the input's row there."""
    try:
        if isinstance(sample, bool):
            raise TypeError
        number = operator.index(sample)
    except TypeError:
        raise InvalidType(
            f"sample is a {type(sample).__name__}, and it must be the number of one input: sample=0 for the first."
        ) from None
    passes = Samples(log_of(acts)).passes
    total = sum(found.size for found in passes)
    if not -total <= number < total:
        raise OutOfRange(f"there is no sample {sample}: {plural(total, 'input')} here, numbered from 0.")
    rest = number % total
    for found in passes:
        if rest < found.size:
            return rest, found
        rest -= found.size
    raise AssertionError("unreachable")


def one_input(found: Any, key: str, tensor: Tensor, row: int, axis: int = 0) -> Tensor:
    """One input's row of an output of a pass, without the batch axis; no copy.

    Raises:
        Unsupported: the axis is not the batch.
    """
    cut: Tensor = found.cut(key, tensor, row, axis)
    return cut


def chosen(acts: Activations, layers: Chosen) -> list[Call]:
    """The calls that some names, call keys, globs and patterns mean, in execution order.

    Raises:
        NotCaptured: there are no calls at all.
        LayerNotFound: one of them means nothing that is here.
        InvalidValue: there are none of them.
    """
    calls = acts.calls()
    if not calls:
        raise NotCaptured(
            "there is nothing to draw: no outputs were captured. Run the model inside the block: "
            "with capture(model) as acts: model(x)"
        )
    if layers is None:
        return calls
    given = [layers] if isinstance(layers, (str, re.Pattern)) else layers
    if not isinstance(given, Iterable):
        raise _no_choice(layers)
    selectors = list(given)
    if not selectors:
        raise InvalidValue("layers is empty, so nothing would be drawn. Pass None for every captured layer.")
    wanted: set[int] = set()
    for selector in selectors:
        matches = [id(call) for call in calls if _means(acts, selector, call)]
        if not matches:
            text = selector if isinstance(selector, str) else selector.pattern
            names = list(dict.fromkeys(name for call in calls for name in (call.name, call.key)))
            raise LayerNotFound(
                f"no captured layer matches {text!r}. Captured here: {listed([call.key for call in calls])}."
                f"{did_you_mean(text, names)}"
            )
        wanted.update(matches)
    return [call for call in calls if id(call) in wanted]


def _means(acts: Activations, selector: Any, call: Call) -> bool:
    if isinstance(selector, re.Pattern):
        return any(selector.fullmatch(name) is not None for name in (call.name, call.key))
    if not isinstance(selector, str):
        raise _no_choice(selector)
    names = (call.name, call.key)
    return (
        selector in names
        or log_of(acts).resolve(selector) == call.name
        or any(fnmatch.fnmatchcase(n, selector) for n in names)
    )


def _no_choice(value: Any) -> InvalidType:
    return InvalidType(
        f"layers: {type(value).__name__} chooses nothing here. Pass a name, a call key such as 'conv#1', a glob, "
        "a re.Pattern, or several of them in a list."
    )


def checked_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{name} is {value!r}, and it must be a whole number. Write for example {name}=64.")
    if value < 1:
        raise InvalidValue(f"{name}={value} leaves nothing to draw. Write for example {name}=64.")
    return int(value)
