"""Finds the time axis of rows, and pads batches of rows on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.index import LayerSummary
from convtap._errors import InvalidType, InvalidValue, Unsupported, listed, warn_user


def given_axis(layer: str, about: LayerSummary, given: Any) -> int | None:
    """Returns the user's ``time_dim`` for a layer, counted from the end, or None.

    Raises:
        InvalidType: ``time_dim`` is not an int.
        InvalidValue: the layer's rows have no such axis.
    """
    dim = given.get(layer) if isinstance(given, Mapping) else given
    if dim is None:
        return None
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise InvalidType(f"time_dim is a {type(dim).__name__}. Pass the axis of a row that is time, such as -1 or -2.")
    if about.shape is None:
        if dim >= 0:
            raise InvalidValue(
                f"time_dim={dim} counts from the front, but the rows of {layer!r} differ in their number of axes. Count from "
                "the end: time_dim=-1."
            )
        return dim
    rank = len(about.shape)
    if not -rank <= dim < rank:
        raise InvalidValue(
            f"time_dim={dim} is not an axis of the rows of {layer!r}, whose shape is {tuple(about.shape)}. Pass one of "
            f"{', '.join(map(str, range(-rank, 0)))}."
        )
    return dim if dim < 0 else dim - rank


def time_axis(layer: str, about: LayerSummary, given: Any) -> int | None:
    """Returns the user's time axis, else the store's. Warns if that is assumed."""
    dim = given_axis(layer, about, given)
    if dim is None and about.is_assumed:
        warn_user(
            f"the time axis of the rows of {layer!r} is unknown, so axis {about.time_dim} of {tuple(about.shape or ())} is "
            f"used. Pass time_dim={about.time_dim} if it is right, or the right axis.",
            UserWarning,
        )
    return about.time_dim if dim is None else dim


def padded(layer: str, rows: list[Tensor], time: int) -> Tensor:
    """Stacks the rows of a batch, and pads shorter ones with zeros on the time axis.

    Raises:
        Unsupported: the rows differ in another axis.
    """
    if len({row.shape for row in rows}) == 1:
        return torch.stack(rows)
    others = {tuple(size for place, size in enumerate(row.shape, -row.dim()) if place != time) for row in rows}
    if len(others) > 1 or any(row.dim() < -time for row in rows):
        which = "last axis" if time == -1 else f"time axis {time}"
        raise Unsupported(
            f"the rows of {layer!r} differ in more than their {which}: {listed([str(tuple(row.shape)) for row in rows], 3)}. "
            "If another axis is time, pass it: store.dataset(time_dim=-2)."
        )
    longest = max(row.shape[time] for row in rows)
    behind = (0, 0) * (-time - 1)  # torch counts from the last axis
    return torch.stack([torch.nn.functional.pad(row, (*behind, 0, longest - row.shape[time])) for row in rows])
