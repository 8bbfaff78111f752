"""Which axis of each captured output is the channels and which is the time, for everything that a picture shows of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convtap._result.activations import Activations, log_of
from convtap._result.call import Call, layout_of, record_of
from convtap._result.samples import Samples
from convtap._tensors.layout import Axes, Layout, axes_of, axes_with_time
from convtap._view.choose import Chosen, chosen
from convtap._view.timeaxis import Place, TimeAxis


class Orientation:
    """The axes of a capture's outputs: as the user says, else the timeline, else the layers' types.

    Args:
        acts: what was captured.
        axis: the picture's time axis, with its timeline if there is one.
        channels_last: True or False for all outputs, or the layers whose outputs are (B, T, C); None where nobody says it.

    Raises:
        LayerNotFound: ``channels_last`` names nothing that is here.
        InvalidType: it is neither a bool nor names.
    """

    def __init__(self, acts: Activations, axis: TimeAxis, channels_last: bool | Chosen = None) -> None:
        self._axis = axis
        self._every = channels_last if isinstance(channels_last, bool) else None
        named = chosen(acts, channels_last) if not isinstance(channels_last, bool) and channels_last is not None else []
        self._named = {id(call) for call in named}
        self._pass_of: dict[int, Any] = {}
        self._same: dict[int, list[Call]] = {}
        for found in Samples(log_of(acts)).passes:
            runs: dict[str, list[Call]] = {}
            for call in found.calls:
                self._pass_of[id(call)] = found
                self._same[id(call)] = runs.setdefault(call.name, [])
                self._same[id(call)].append(call)

    def place(self, call: Call) -> Place:
        """A call's place, by its number among the layer's calls in the pass; the name alone if it is the only one."""
        same = self._same[id(call)]
        number = None if len(same) == 1 else next(i for i, other in enumerate(same) if other is call)
        return self._axis.place(call.layer, number, record_of(call).separator, call.part)

    def axes(self, call: Call, path: str, tensor: Tensor) -> Axes:
        """Returns the axes of one tensor of a call. See Note: [Which axis is time]."""
        shape, batched = tuple(tensor.shape), self.is_batched(call, tensor)
        said = True if id(call) in self._named else self._every
        if said is not None:
            return axes_of(shape, Layout(last=said), batched=batched)
        layout = layout_of(call, path)
        dim = self.place(call).dim_of(path) if self._axis.has_timeline else None
        found = None if dim is None else axes_with_time(shape, dim, layout, batched=batched)
        return axes_of(shape, layout, batched=batched) if found is None else found

    def is_batched(self, call: Call, tensor: Tensor) -> bool:
        """Whether an output has an axis of inputs: not if the model was given a single signal without one."""
        found = self._pass_of[id(call)]
        return not found.single or (found.unsqueezed and tensor.dim() == 3)

    def frames(self, call: Call, path: str, tensor: Tensor) -> int:
        """Returns how many frames an output has; 1 without a time axis."""
        axes = self.axes(call, path, tensor)
        if axes.time is None:
            return 1
        row = list(tensor.shape)
        if self.is_batched(call, tensor):
            del row[axes.batch]
        return int(row[axes.time])
