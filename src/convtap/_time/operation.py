"""One operation of a pass, as the rules of the time axis see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from convtap._time.mark import Mark, unknown


class Shape:
    """The shape and strides of a tensor, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.strides = tuple(tensor.stride())
        self.offset = int(tensor.storage_offset())

    def dim(self) -> int:
        """The number of axes."""
        return len(self.shape)


def _constant(value: Any) -> Mark | None:
    return None


@dataclass(frozen=True)
class Op:
    """One operation that ran.

    Attributes:
        func: the function or operation.
        name: its name, such as ``add``, without the overload and without the underscore of an in-place form.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: its result. For an in-place form, the tensor that it wrote.
        module: the module in whose forward it ran.
        mark: returns the mark of a tensor. Returns None if the tensor does not depend on the input, and for other objects.
        time_dim: the axis of the model's input that is time, until a convolution has run over it; None afterwards.
        settled: whether its numbers are settings of a layer, which do not depend on the input's length.
        trains: whether the module was in train mode before the pass.
        partner: the other time axis, if the rule looks at one axis of frames against frames.
        label: its name in remarks, if that differs from ``name``.
    """

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any
    module: str
    mark: Callable[[Any], Mark | None] = field(default=_constant)
    time_dim: int | None = None
    settled: bool = False
    trains: bool = False
    partner: Mark | None = None
    label: str = ""

    @property
    def what(self) -> str:
        """The operation in a remark, such as ``roll in 'encoder.shift'``."""
        name = self.label or self.name
        return f"{name} in {self.module!r}" if self.module else name

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """Returns an argument by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def flags(self, start: int) -> list[bool]:
        """Returns the positional arguments from ``start`` on that are bools, in order."""
        return [value for value in self.args[start:] if isinstance(value, bool)]

    def tensors(self) -> list[Any]:
        """Returns the tensors among the arguments, including those in lists."""
        values = (*self.args, *self.kwargs.values())
        found = (one for value in values for one in (value if isinstance(value, (list, tuple)) else [value]))
        return [one for one in found if hasattr(one, "dim")]  # a tensor, or the shape of one

    @property
    def rank(self) -> int:
        """The number of axes of the first argument."""
        return int(self.args[0].dim())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first argument."""
        return tuple(self.args[0].shape)

    def dim(self, position: int, default: Any = 0) -> int:
        """Reads an argument that names one axis of the first tensor."""
        return int(self.arg(position, "dim", default)) % max(1, self.rank)

    def dims(self, value: Any) -> list[int]:
        """Reads an argument that names axes: an int, several ints, or None for all."""
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return list(range(self.rank))
        several = value if isinstance(value, (list, tuple)) else [value]
        return [int(dim) % max(1, self.rank) for dim in several]


#: Returns the mark of an operation's result, or None if it does not depend on the input.
Rule = Callable[[Op], "Mark | None"]


def of_input(rule: Callable[[Op, Mark], Mark]) -> Rule:
    """Makes a rule from a function of an operation and its first argument's mark.

    The function is called only if that mark has a time axis.
    """

    def guarded(op: Op) -> Mark | None:
        mark = op.mark(op.args[0])
        return mark if mark is None or mark.unknown or not mark.digits else rule(op, mark)

    return guarded


def not_along(position: int, default: Any, why: str) -> Callable[[Op, Mark], Mark]:
    """Makes a rule for an operation that is followed only along axes other than time.

    The argument at ``position`` names the axes.
    """

    def followed(op: Op, mark: Mark) -> Mark:
        along = mark.dims.intersection(op.dims(op.arg(position, "dim", default)))
        return unknown(f"{op.what}: {why}") if along else mark

    return followed
