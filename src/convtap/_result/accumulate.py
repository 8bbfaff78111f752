"""Adds outputs to the statistics of their layers, without keeping the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convtap._errors import InvalidValue, Unsupported
from convtap._result.call import Call, is_convolution, layout_of, record_of
from convtap._result.layer_statistics import LayerStatistics, source_of
from convtap._tensors.channel_statistics import ChannelStatistics
from convtap._tensors.layout import axes_of
from convtap._tensors.nested import walk_tensors
from convtap._tensors.quantile_sketch import digits_for
from convtap._tensors.statistics import real_values
from convtap._torch.modes import outside_modes
from convtap._torch.transforms import outside_transforms

#: The smallest relative error of quantiles, which takes 1 MiB per channel.
_LEAST = 0.0002

#: Returns the values of a call's tensor to add, and their channel axis.
Choose: TypeAlias = "Callable[[Call, str, Tensor], tuple[Tensor, int | None]]"


class Accumulator:
    """Adds outputs to statistics, with a row for each layer or for each of its calls.

    Args:
        layers: the statistics by name. New layers are added to it.
        by_channel: whether each channel has its own statistics.
        by_run: whether each call of a layer within a forward pass has a row: ``conv#0``, ``conv#1``.
        digits: the precision of the quantiles, as in ``Sketch``; None for no quantiles.
        choose: selects the values of a tensor to add; None for all.
    """

    def __init__(
        self,
        layers: dict[str, LayerStatistics],
        *,
        by_channel: bool,
        by_run: bool,
        digits: int | None,
        choose: Choose | None = None,
    ) -> None:
        self._layers = layers
        self._by_channel = by_channel
        self._by_run = by_run
        self._digits = digits
        self._choose = choose or _all
        #: For each layer, its newest pass and the number of its newest call there.
        self._runs: dict[str, tuple[int, int]] = {}
        self._most: dict[str, int] = {}

    def add(self, call: Call) -> None:
        """Adds the output of a call.

        Raises:
            Unsupported: the output has no ordinary values, or its number of channels has changed.
        """
        stem = self._stem(call)
        # no_grad inside, since an interrupt may free torch's guard later, which then restores what it found
        with outside_transforms(), outside_modes(), torch.inference_mode(False), torch.no_grad():
            for path, tensor in walk_tensors(call.output):
                values, axis = self._choose(call, path, _readable(call, tensor))
                self._add(stem + path, values, axis if self._by_channel else None)

    def _add(self, key: str, values: Tensor, axis: int | None) -> None:
        channels = 1 if axis is None else values.shape[axis]
        layer = self._layers.get(key)
        if layer is None:
            source = ChannelStatistics(channels, self._digits, values.device)
            layer = self._layers[key] = LayerStatistics(key, source, by_channel=self._by_channel)
        source = source_of(layer)
        if source.channels != channels:
            raise Unsupported(
                f"{key!r} returned {source.channels} channels before and {channels} now. Pass per='layer', or "
                "calls='keys' if it runs several times in one forward pass."
            )
        source.add(values, axis)
        layer.calls += 1

    def _stem(self, call: Call) -> str:
        """Returns the name of a call's row, without the path of a tensor."""
        if not self._by_run:
            return call.name
        newest, number = self._runs.get(call.name, (-1, -1))
        number = number + 1 if newest == call.forward else 0
        self._runs[call.name] = (call.forward, number)
        record = record_of(call)
        if number == 1 and self._most.get(call.name, 0) == 0:
            self._rename(call.name, record.key(0, 2))
        self._most[call.name] = max(number, self._most.get(call.name, 0))
        return record.key(number, self._most[call.name] + 1)

    def _rename(self, name: str, key: str) -> None:
        """Numbers the rows of a layer when it runs a second time in one pass."""
        layers = list(self._layers.items())
        self._layers.clear()
        for old, layer in layers:
            if old == name or old.startswith(f"{name}["):
                layer.name = key + old.removeprefix(name)
            self._layers[layer.name] = layer


def channel_axis(call: Call, path: str, tensor: Tensor) -> int | None:
    """Returns the channel axis of a tensor in a call's output, or None."""
    layout = layout_of(call, path)
    if is_convolution(call) and not (layout is not None and layout.last):
        if tensor.dim() == 2:  # (C, T) of a single signal; an activation may come after a Flatten
            count = None if layout is None else layout.channels
            return 1 if count is not None and tensor.shape[0] != count and tensor.shape[1] == count else 0
        if tensor.dim() > 3:  # vmap puts axes in front
            return -2
    return axes_of(tensor.shape, layout).channel


def _all(call: Call, path: str, tensor: Tensor) -> tuple[Tensor, int | None]:
    return tensor, channel_axis(call, path, tensor)


def _readable(call: Call, tensor: Tensor) -> Tensor:
    """Returns the values of a tensor as an ordinary floating-point tensor."""
    if tensor.is_nested:
        what = "is nested and has no channel axis"
    else:
        try:
            return real_values(tensor.detach(), call.name)
        except Unsupported:
            placed: Any = getattr(tensor, "placements", None)
            what = f"is a {type(tensor).__name__}" + (f" with placements {tuple(placed)}" if placed else " on meta")
    raise Unsupported(
        f"the output of {call.name!r} {what}, but statistics need ordinary values. Select only the other layers: layers=[...]."
    )


def row_options(per: Any, calls: Any, quantiles: Any) -> dict[str, Any]:
    """Returns the row options of ``statistics`` as arguments of ``Accumulator``.

    Raises:
        InvalidValue: an option is invalid.
    """
    for name, value, choices in (("per", per, ("channel", "layer")), ("calls", calls, ("join", "keys"))):
        if value not in choices:
            raise InvalidValue(f"{name}={value!r} is invalid. Pass one of {', '.join(map(repr, choices))}.")
    is_number = isinstance(quantiles, (int, float)) and not isinstance(quantiles, bool)
    if quantiles is not None and not (is_number and _LEAST <= quantiles < 1):
        raise InvalidValue(
            f"quantiles={quantiles!r} is not a relative error. Pass a number from {_LEAST} to 1, such as quantiles=0.01, or "
            "None for no quantiles."
        )
    digits = None if quantiles is None else digits_for(quantiles)
    return {"by_channel": per == "channel", "by_run": calls == "keys", "digits": digits}
