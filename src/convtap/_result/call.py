"""A call of a layer and the record of all of its calls."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from convtap._errors import NotCaptured
from convtap._public import public
from convtap._result.gradient import Gradient
from convtap._result.keys import numbered, separator
from convtap._spelling import printable
from convtap._tensors.layout import Layout
from convtap._tensors.memory import memory_of, tensor_bytes
from convtap._tensors.nested import MISSING, Held, map_leaves, read, walk_tensors
from convtap._tensors.statistics import dtype_text, shapes, shapes_text


class LayerRecord:
    """The counts of one layer in a capture: its calls, kept calls and bypasses.

    Attributes:
        name: the layer.
        is_conv1d: whether it is a Conv1d module.
    """

    # The class attributes are the initial values. An instance stores only the values that differ.
    captured = 0
    ran = 0  # counted only with at="activation", where captured counts the activations
    held = 0
    cleared = 0
    last_pass = -1
    bypassed: str | None = None
    bypasses = 0
    pending: tuple[int, object] | None = None
    computed = False
    separator = "#"
    layout: Layout | None = None

    def __init__(self, name: str, is_conv1d: bool, part: str = "") -> None:
        self.name = name
        self.is_conv1d = is_conv1d  # a flag, since a pickle may not find the class by its name
        self.part = part  # the path of the selected part of the output, as in the name

    @property
    def layer(self) -> str:
        """The name of the layer, without the part."""
        return self.name.removesuffix(self.part)

    def key(self, number: int, count: int) -> str:
        """Returns the key of one of ``count`` calls: ``conv#1``, ``lstm#1[0]``."""
        return numbered(self.layer, number, count, self.separator, self.part)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.pending is not None:  # the reader is a place in code, which cannot be pickled
            state["pending"] = (self.pending[0], str(self.pending[1]))
        return state

    def read_by(self, reader: object, forward: int) -> None:
        """Notes a read of the layer's weight before its convolution in a pass."""
        if self.last_pass == forward or (self.pending is not None and self.pending[0] == forward):
            return
        self.count_bypass()
        self.pending = (forward, reader)

    def count_bypass(self) -> None:
        """Counts the noted read as a bypass, if no convolution of its pass followed it."""
        if self.pending is not None:
            self.bypasses += 1
            self.bypassed = self.bypassed or str(self.pending[1])
            self.pending = None


@public
class Call:
    """One call of a layer.

    Attributes:
        index: the number of earlier calls of the layer in this capture.
        forward: the number of its forward pass, which is a call of the model or of one of its methods.
        via: how convtap saw it: ``"module"``, ``"function"``, ``"compiled"``, ``"script"`` or ``"keras"``.
    """

    __slots__ = ("_gradient", "_input", "_record", "_value", "forward", "index", "via")

    def __init__(
        self,
        record: LayerRecord,
        index: int,
        forward: int,
        via: str,
        value: Any,
        gradient: Gradient | None = None,
        given: Any = MISSING,
    ) -> None:
        self._record = record
        self.index = index
        self.forward = forward
        self.via = via
        self._value = value
        self._gradient = gradient
        self._input = given

    def __getstate__(self) -> Any:  # a copy or a pickle has values but no graph
        state = {name: getattr(self, name) for name in self.__slots__ if name != "_input"}
        state["_value"] = map_leaves(_without_graph, self._value, other=_as_it_is)
        if given_of(self) is not MISSING:
            state["_input"] = map_leaves(_without_graph, self._input, other=_as_it_is)
        return None, state

    @property
    def name(self) -> str:
        """The layer's name."""
        return self._record.name

    @property
    def layer(self) -> str:
        """The name of the layer, without the selected part of its output."""
        return self._record.layer

    @property
    def part(self) -> str:
        """The path of the selected part, such as ``[0]``; empty for the whole output."""
        return self._record.part

    @property
    def key(self) -> str:
        """The key in the mapping: ``name`` for the only call of a layer, else ``name#k``."""
        record = self._record
        return record.key(self.index, record.held)

    @property
    def output(self) -> Any:
        """The output: a tensor such as (B, C, T), or a structure of tensors.

        Raises:
            ModifiedInPlace: it is an alias (``copy=False``) that the model has changed.
        """
        value = self._value
        return value if type(value) is Tensor else read(value, self.key)

    @property
    def input(self) -> Any:
        """The input of the call.

        It is the argument itself, such as (B, C, T), a tuple of several arguments, or a dict of named arguments.

        Raises:
            NotCaptured: the capture was not opened with ``inputs=True``.
            ModifiedInPlace: it is an alias (``copy=False``) that the model has changed.
        """
        if given_of(self) is MISSING:
            raise NotCaptured(
                f"the input of {self.key!r} was not captured. Write: with capture(model, inputs=True) as acts: …"
            )
        return read(self._input, self.key)

    @property
    def grad(self) -> Any:
        """d(loss)/d(output), or None if no backward pass has reached the layer.

        It has the shape of the whole output, even if ``reduce`` keeps less. It comes from the last ``loss.backward()`` or
        ``torch.autograd.grad`` that reached the layer, inside the capture or after it.

        Raises:
            NotCaptured: the capture was not opened with ``grads=True``, or the output has no autograd graph.
        """
        if self._gradient is None:
            raise NotCaptured(
                f"the gradient of {self.key!r} was not captured (and saved files hold no gradients). Write: with "
                "capture(model, grads=True) as acts: …"
            )
        return read(self._gradient.read(self.key), self.key)

    @property
    def shape(self) -> Any:
        """The shape of the output, as a ``torch.Size``, or a structure of shapes."""
        return shapes(shown_value(self))

    @property
    def dtype(self) -> Any:
        """The data type of the output's first tensor, or None if it has no tensor."""
        return next((tensor.dtype for _, tensor in walk_tensors(shown_value(self))), None)

    @property
    def device(self) -> Any:
        """The device of the output's first tensor, or None if it has no tensor."""
        return next((tensor.device for _, tensor in walk_tensors(shown_value(self))), None)

    @property
    def nbytes(self) -> int:
        """The bytes of the output's elements."""
        return sum(tensor_bytes(tensor) for _, tensor in walk_tensors(shown_value(self)))

    def __repr__(self) -> str:
        return printable(f"<Call {self.key} {shapes_text(self.shape)} {dtype_text(self.dtype)} via {self.via}>")


def record_of(call: Call) -> LayerRecord:
    """Returns the record of the call's layer."""
    return call._record


def moved(call: Call, record: LayerRecord, forward: int | None = None) -> Call:
    """Returns a copy of a call with another record or forward pass."""
    forward = call.forward if forward is None else forward
    return Call(record, call.index, forward, call.via, call._value, call._gradient, given_of(call))


def is_convolution(call: Call) -> bool:
    """Returns whether a call is a 1-D convolution, of a module or without one."""
    return call._record.is_conv1d or call.via in ("function", "compiled", "script")


def layout_of(call: Call, path: str) -> Layout | None:
    """Returns the channel and time axes of an output's tensor if they are known."""
    if call.part + path not in ("", "[0]"):
        return None
    found = call._record.layout
    return Layout() if found is None and is_convolution(call) else found


def given_of(call: Call) -> Any:
    """Returns the kept input of a call, or ``MISSING``."""
    return getattr(call, "_input", MISSING)


def held_value(call: Call) -> Any:
    """Returns the kept output of a call: tensors, or their placeholders."""
    return call._value


def shown_value(call: Call) -> Any:
    """Returns the output for descriptions, without waiting for it or checking it."""
    return map_leaves(lambda held: held.tensor, call._value, Held)


def _without_graph(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _as_it_is(held: Any) -> Any:
    return held


def append_runs(lists: dict[str, list[Call]], calls: Iterable[Call]) -> None:
    """Appends calls to the lists of their layers, and numbers them by position."""
    for call in calls:
        name = call._record.name
        runs = lists.get(name)
        if runs is None:
            lists[name] = [call]
            continue
        number = len(runs)
        if call.index != number or runs[0].index:  # two threads that run a layer at once may take the same number
            runs[0].index, call.index = 0, number
        runs.append(call)


def value_bytes(calls: Iterable[Call]) -> int:
    """Sums the bytes of the calls' elements. Shared memory counts for each call."""
    plain, total = torch.strided, 0
    for call in calls:
        value = call._value
        is_plain = type(value) is Tensor and value.layout is plain and not value.is_nested
        total += value.nbytes if is_plain else call.nbytes
    return total


def held_bytes(calls: Iterable[Call]) -> dict[tuple[str, int], int]:
    """Returns the bytes that calls keep alive, by device and memory address.

    Memory that several calls share has one entry.
    """
    found: dict[tuple[str, int], int] = {}
    for call in calls:
        if type(call._value) is Tensor and given_of(call) is MISSING and call._gradient is None:
            found.update(memory_of(call._value))  # most calls
            continue
        for _, tensor in walk_tensors([shown_value(call), map_leaves(lambda held: held.tensor, given_of(call), Held)]):
            found.update(memory_of(tensor))
        if call._gradient is not None and call._gradient.nbytes:
            found[("gradient", id(call._gradient))] = call._gradient.nbytes
    return found


def separate(records: Iterable[LayerRecord], taken: Container[str]) -> None:
    """Sets the separator of each layer, so that no key is another layer's name.

    Args:
        records: the layers.
        taken: the ``stems`` of all layers' names.
    """
    for record in list(records):
        record.separator = separator(record.layer, taken)
