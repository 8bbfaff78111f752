"""How the values of a layer are spread, over all its calls and inputs: quantiles, zeros, dead channels."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from convtap._result.call import Call, record_of, shown_value
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import real_values
from convtap._view.cells import Array
from convtap._view.choose import Chosen, chosen
from convtap._view.labels import counted
from convtap._view.orient import Orientation

if TYPE_CHECKING:
    from convtap._result.activations import Activations

QUANTILES = (1, 25, 50, 75, 99)


@dataclass(frozen=True)
class Spread:
    """How the values of one layer are spread.

    Attributes:
        name: the layer; with the path of the tensor, if it returns several.
        quantiles: of the finite values, at QUANTILES percent; None if there are none.
        zeros: the share of exact zeros among all values, or None without values.
        dead: how many channels have one and the same value everywhere (if there is one value only: zero).
        channels: how many channels there are; 0 if the calls do not agree on it.
        bad: how many values are NaN, and how many Inf.
        assumed: the axis that was taken to be the channels where nobody says it, such as ``"axis 1"``.
    """

    name: str
    quantiles: tuple[float, ...] | None
    zeros: float | None
    dead: int
    channels: int
    bad: tuple[int, int]
    assumed: str = ""

    @property
    def dead_share(self) -> float | None:
        """The share of dead channels, or None if channels cannot be told apart."""
        return self.dead / self.channels if self.channels else None

    @property
    def dead_text(self) -> str:
        """The dead channels of all, as text, with the axis that was assumed to be theirs."""
        assumed = f" ({self.assumed}?)" if self.assumed else ""
        return f"{self.dead:,} of {self.channels:,}{assumed}" if self.channels else "–"

    @property
    def warning(self) -> str:
        """How much of it is no number, or nothing."""
        return counted(self.bad)


def spreads(
    acts: Activations, orientation: Orientation, layers: Chosen = None, calls: list[Call] | None = None
) -> list[Spread]:
    """Computes the spread of each chosen layer over all inputs, or of each of some calls; one at a time.

    A layer that ran several times in one forward pass has one for each of these runs: ``act#0``, ``act#1``, …

    Raises:
        NotCaptured: there are no outputs.
        LayerNotFound: ``layers`` means nothing that is here.
    """
    stems = _numbered_in_passes(acts.calls())
    groups: dict[str, list[tuple[Call, str]]] = {}
    for call in chosen(acts, layers) if calls is None else calls:
        stem = stems[id(call)] if calls is None else call.key
        for path, _ in walk_tensors(shown_value(call)):
            groups.setdefault(f"{stem}{path}", []).append((call, path))
    found = []
    for name, places in groups.items():
        parts, assumed = [], ""
        for call, path in places:
            tensor = dict(walk_tensors(call.output))[path]
            if tensor.device.type != "meta":
                array = real_values(tensor.detach()).cpu().numpy()
                axes = orientation.axes(call, path, tensor)
                parts.append(_by_channel(array, axes.channel))
                if not axes.sure:
                    assumed = "last axis" if axes.channel == -1 else f"axis {array.ndim + (axes.channel or 0)}"
        found.append(replace(_spread(name, parts), assumed=assumed))
    return found


def _numbered_in_passes(calls: list[Call]) -> dict[int, str]:
    """Returns the layer's name for each call, with the number of the call in its pass if any pass has several."""
    numbers: dict[int, int] = {}
    times: Counter[tuple[str, int]] = Counter()
    for call in calls:
        numbers[id(call)] = times[call.name, call.forward]
        times[call.name, call.forward] += 1
    several = {name for (name, _), count in times.items() if count > 1}
    return {id(call): record_of(call).key(numbers[id(call)], 2 if call.name in several else 1) for call in calls}


def _by_channel(array: Array, channel: int | None) -> Array:
    """All values of an output as (channels, values)."""
    if array.ndim == 0:
        return array.reshape(1, 1)
    axis = 0 if channel is None else channel
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _spread(name: str, parts: list[Array]) -> Spread:
    flat = [part.reshape(-1) for part in parts]
    values = flat[0] if len(flat) == 1 else np.concatenate([np.zeros(0, np.float32), *flat])
    if not values.size:
        return Spread(name, None, None, 0, 0, (0, 0))
    finite = values[np.isfinite(values)]
    bad = (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    zeros = float((values == 0).mean())
    quantiles = tuple(float(q) for q in np.percentile(finite, QUANTILES)) if finite.size else None
    if len({len(part) for part in parts}) > 1:
        return Spread(name, quantiles, zeros, 0, 0, bad)
    return Spread(name, quantiles, zeros, int(_dead(parts).sum()), len(parts[0]), bad)


def _dead(parts: list[Array]) -> Array:
    parts = [part for part in parts if part.size]
    low = np.min([part.min(axis=1) for part in parts], axis=0)
    high = np.max([part.max(axis=1) for part in parts], axis=0)
    if sum(part.shape[1] for part in parts) == 1:
        return np.asarray(low == 0)
    return np.asarray(low == high)


def linear_up_to(widths: list[float]) -> float | None:
    """A power of ten up to which the common scale is linear, or None where one linear scale shows every layer."""
    widths = sorted(width for width in widths if width > 0)
    if not widths or widths[-1] <= 10 * widths[len(widths) // 2]:
        return None
    return float(10.0 ** math.floor(math.log10(widths[len(widths) // 4])))
