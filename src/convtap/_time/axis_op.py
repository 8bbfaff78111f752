"""One operation of a pass, as the rules of the time axis see it: its arguments, its result, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convtap._time.mark import Mark


class Shape:
    """Stands for a tensor where only its shape matters, and keeps none of its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self._stride = tuple(tensor.stride())
        self._offset = int(tensor.storage_offset())

    def dim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def stride(self) -> tuple[int, ...]:
        """Elements from one position to the next, by axis."""
        return self._stride

    def storage_offset(self) -> int:
        """Elements before the first one."""
        return self._offset


class Op:
    """One operation that ran.

    Attributes:
        name: its name without overload and without the mark of an in-place form: ``add``.
        args: what it was given.
        kwargs: what it was given by name.
        out: what it returned; of an in-place form, the tensor that it wrote.
        module: the module in whose forward it ran.
        time_dim: which axis of the model's input is time, until a convolution has run over it; None afterwards.
        settled: whether its numbers are those of a layer, and so do not depend on the input's length.
        trains: whether the module was in train mode before the pass.
        partner: the other time axis, if the rule looks at one axis of frames against frames.
    """

    def __init__(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        module: str,
        time_dim: int | None,
        mark_of: Callable[[Any], Mark | None],
        *,
        settled: bool = False,
        trains: bool = False,
    ) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.module = module
        self.time_dim = time_dim
        self.settled = settled
        self.trains = trains
        self.partner: Mark | None = None
        self._mark_of = mark_of

    @property
    def what(self) -> str:
        """Names the operation in a remark: ``roll in 'encoder.shift'``."""
        return f"{self.name} in {self.module!r}" if self.module else self.name

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """Returns an argument by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def mark(self, value: Any) -> Mark | None:
        """Returns what is known of a tensor; None if it does not depend on the input, or is no tensor."""
        return self._mark_of(value)

    def seen_as(self, mark_of: Callable[[Any], Mark | None], partner: Mark | None = None) -> Op:
        """Returns the same operation with other knowledge of its arguments."""
        found = Op(self.name, self.args, self.kwargs, self.out, self.module, self.time_dim, mark_of)
        found.settled, found.trains, found.partner = self.settled, self.trains, partner
        return found

    def tensors(self) -> list[Any]:
        """Returns the tensors among the arguments, those in lists included."""
        found: list[Any] = []
        for value in (*self.args, *self.kwargs.values()):
            found.extend(one for one in (value if isinstance(value, (list, tuple)) else [value]) if hasattr(one, "dim"))
        return found

    @property
    def rank(self) -> int:
        """The number of axes of the first argument."""
        return int(self.args[0].dim())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first argument."""
        return tuple(self.args[0].shape)

    def dims(self, value: Any) -> list[int]:
        """Reads an argument that names axes of the first tensor: an int, several, or None for all."""
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return list(range(self.rank))
        several = value if isinstance(value, (list, tuple)) else [value]
        return [int(dim) % max(1, self.rank) for dim in several]


def is_composite(func: Any) -> bool:
    """Whether an operation is made of others, which is how it is followed if it has no rule of its own."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def written(schema: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Returns the tensor that an operation writes to, or None."""
    if not schema.is_mutable:
        return None
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor):
                return value
    return None


def is_view(schema: Any) -> bool:
    """Whether an operation returns a view of an argument."""
    return any(result.alias_info is not None for result in schema.returns)
