"""The marks of the tensors of a pass, shared between a tensor and its views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from convtap._time.mark import Mark
from convtap._time.operation import Op, Shape
from convtap._time.table import apply
from convtap._time.views import COVERING, MANY, base_after, pieces


class Node:
    """The mark of one tensor.

    A view asks its base, so that both see a write through either of them.
    """

    __slots__ = ("_mark", "_op", "_parent")

    def __init__(self, mark: Mark | None = None, parent: Node | None = None, op: Op | None = None) -> None:
        self._mark = mark
        self._parent = parent
        self._op = op

    def get(self) -> Mark | None:
        """Returns the mark, or None if the tensor does not depend on the input."""
        if self._parent is None or self._op is None:
            return self._mark
        base = self._parent.get()
        return None if base is None else apply(replace(self._op, mark=lambda value: base))

    def put(self, mark: Mark | None) -> None:
        """Notes that the tensor was written to."""
        if self._parent is None or self._op is None:
            self._mark = mark
        elif mark is not None:
            self._parent.put(base_after(self._op, self._parent.get(), mark))
        elif self._op.name in COVERING:
            self._parent.put(None)


class Nodes:
    """The marks of the tensors of a pass, as long as these live."""

    def __init__(self) -> None:
        self._nodes: Any = WeakTensorKeyDictionary()

    def mark(self, value: Any) -> Mark | None:
        """Returns the mark of a tensor, or None if it does not depend on the input."""
        node = self._nodes.get(value) if isinstance(value, Tensor) else None
        return None if node is None else node.get()

    def touches(self, values: Any) -> bool:
        """Returns whether any value, or one in a list, depends on the input."""
        return any(
            self.touches(value) if isinstance(value, (list, tuple)) else self.mark(value) is not None
            for value in values
        )

    def set(self, tensor: Tensor, mark: Mark | None) -> None:
        """Sets the mark of a new tensor."""
        self._nodes[tensor] = Node(mark)

    def write(self, tensor: Tensor, mark: Mark | None) -> None:
        """Notes that a tensor was written to."""
        node = self._node(tensor)
        if node.get() != mark:
            node.put(mark)

    def view(self, op: Op, base: Tensor) -> None:
        """Notes that the results of an operation are views of another tensor."""
        parent = self._node(base)
        for one in pieces(op) if op.name in MANY else [op]:
            self._nodes[one.out] = Node(parent=parent, op=replace(one, out=Shape(one.out)))

    def _node(self, tensor: Tensor) -> Node:
        node = self._nodes.get(tensor)
        if node is None:
            node = self._nodes[tensor] = Node()
        return node  # type: ignore[no-any-return]
