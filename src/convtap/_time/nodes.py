"""What is known of the tensors of a pass, shared between a tensor and its views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from convtap._time.axis import TooFine
from convtap._time.mark import Mark, unknown
from convtap._time.operation import Op, Shape
from convtap._time.table import apply, apply_pieces
from convtap._time.views import COVERING, base_after


class Node:
    """What is known of one tensor. A view asks its base, so that a write through either is seen by both."""

    __slots__ = ("_index", "_mark", "_op", "_parent")

    def __init__(self, mark: Mark | None = None, parent: Node | None = None, op: Any = None, index: int | None = None):
        self._mark = mark
        self._parent = parent
        self._op = op
        self._index = index

    def get(self) -> Mark | None:
        """Returns the mark, or None if the tensor does not depend on the input."""
        if self._parent is None:
            return self._mark
        base = self._parent.get()
        if base is None:
            return None
        func, op = self._op
        op = replace(op, mark=lambda value: base)
        try:
            return apply(func, op) if self._index is None else apply_pieces(op)[self._index]
        except TooFine:
            return unknown(f"{op.what}: the rate of frames is too fine")

    def put(self, mark: Mark | None) -> None:
        """Notes that the tensor was written to."""
        if self._parent is None:
            self._mark = mark
            return
        _, op = self._op
        if mark is not None:
            self._parent.put(base_after(op, self._parent.get(), mark, self._index))
        elif op.name in COVERING:
            self._parent.put(None)


class Nodes:
    """The tensors of a pass of which something is known, for as long as they live."""

    def __init__(self) -> None:
        self._nodes: Any = WeakTensorKeyDictionary()

    def mark(self, value: Any) -> Mark | None:
        """Returns what is known of a tensor; None if it does not depend on the input."""
        node = self._nodes.get(value) if isinstance(value, Tensor) else None
        return None if node is None else node.get()

    def touches(self, values: Any) -> bool:
        """Whether any of the values depends on the input, those in lists included."""
        return any(
            self.touches(value) if isinstance(value, (list, tuple)) else self.mark(value) is not None
            for value in values
        )

    def set(self, tensor: Tensor, mark: Mark | None) -> None:
        """Notes what is known of a new tensor."""
        self._nodes[tensor] = Node(mark)

    def write(self, tensor: Tensor, mark: Mark | None) -> None:
        """Notes that a tensor was written to."""
        node = self._node(tensor)
        if node.get() != mark:
            node.put(mark)

    def view(self, func: Any, op: Op, base: Tensor) -> None:
        """Notes that the result of an operation, a tensor or several, is a view of another tensor."""
        several = isinstance(op.out, (tuple, list))
        tensors = op.out if several else [op.out]
        shapes = [Shape(tensor) for tensor in tensors]
        kept = func, replace(op, out=shapes if several else shapes[0])
        parent = self._node(base)
        for i, tensor in enumerate(tensors):
            self._nodes[tensor] = Node(parent=parent, op=kept, index=i if several else None)

    def _node(self, tensor: Tensor) -> Node:
        node = self._nodes.get(tensor)
        if node is None:
            node = self._nodes[tensor] = Node()
        return node  # type: ignore[no-any-return]
