"""Follows fetched weights: a tensor subclass sees the torch calls that use them."""

from __future__ import annotations

import copy
import functools
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from convtap._torch.convolution_key import FUNCTIONS
from convtap._torch.lock import Lock

# See Note: [What reads a weight]. An attribute counts as a read only if it is in ``_GETTERS``. A method counts unless it is
# in ``_METADATA`` or ends in ``_``.
_GETTERS = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data")}
_METADATA = frozenset(
    (  # noqa: SIM905 (thirty quoted words read worse)
        "size dim ndimension numel nelement stride storage_offset is_contiguous element_size is_floating_point is_complex "
        "is_signed is_conj is_neg is_inference is_pinned is_shared is_set_to get_device has_names type dim_order "
        "new_ones new_zeros new_empty new_full new_tensor zeros_like ones_like empty_like full_like rand_like randn_like "
        "type_as result_type expand_as view_as reshape_as storage untyped_storage "
        "register_hook register_post_accumulate_grad_hook retain_grad backward _is_view "
        "__len__ __hash__ __repr__ __format__ __bool__ __deepcopy__ __reduce_ex__ __setstate__ __set__ __delete__"
    ).split()
)

# These functions do not count as a read, but convtap follows their results.
_PASSING_ON = frozenset(("detach", "cpu", "data"))

_frame = sys._getframe
_lock = Lock()


class Reader(Protocol):
    """Receives the reads of the weights of a capture's layers."""

    def may_read(self, name: str) -> bool:
        """Returns whether to follow a layer's weight.

        Code other than the layer's own forward fetched the weight.
        """

    def weight_used(self, name: str, by: Read) -> None:
        """Notes that a call used the values of a layer's weight."""


class Read(NamedTuple):
    """A function that used a weight's values, and the place where it was fetched.

    ``str`` looks up the line number, which is slow.
    """

    function: str
    code: CodeType
    instruction: int

    def __str__(self) -> str:
        lines = (line for start, end, line in self.code.co_lines() if start <= self.instruction < end)
        file = os.path.basename(self.code.co_filename)
        return f"{self.function} ({file}:{next(lines, self.code.co_firstlineno)})"


class _Mark:
    """A followed tensor: a weight, or a tensor that was made of one.

    It holds the readers with their layers' names, and the place where the weight was fetched.
    """

    __slots__ = ("is_new", "kind", "readers", "tensor", "where")

    def __init__(self, tensor: Tensor, where: tuple[CodeType, int] | None) -> None:
        self.is_new = False  # True for a new parameter that was made of a weight
        self.tensor = weakref.ref(tensor)
        self.kind = type(tensor)
        self.readers: list[tuple[Reader, str]] = []
        self.where = where


_marks: dict[int, _Mark] = {}


def follow(tensor: Any, readers: list[tuple[Reader, str]], where: tuple[CodeType, int] | None) -> None:
    """Changes a tensor's class to one that sees the torch calls on it."""
    with _lock:
        kind = _KINDS.get(type(tensor))
        mark = _marks.get(id(tensor))
        if mark is None or mark.tensor() is not tensor:
            if kind is None:
                return
            mark = _Mark(tensor, where)
            _marks[id(tensor)] = mark
            tensor.__class__ = kind
        mark.readers.extend(pair for pair in readers if pair not in mark.readers)


def release(reader: Reader | None) -> None:
    """Restores the class of the tensors that are followed for one reader only."""
    if not _marks:
        return
    with _lock:
        for key, mark in list(_marks.items()):
            mark.readers = [pair for pair in mark.readers if pair[0] is not reader]
            if not mark.readers:
                tensor = mark.tensor()
                if tensor is not None:
                    tensor.__class__ = mark.kind
                _marks.pop(key, None)  # last: see Note: [Interrupts]


def is_made_of(tensor: Any, reader: Reader) -> str | None:
    """Returns the layer whose weight a tensor was computed from, or None.

    The weight may have been masked, scaled or cast.
    """
    mark = _mark_of(tensor)
    return None if mark is None else next((name for who, name in mark.readers if who is reader), None)


class _Reading:
    """Sees the torch calls on a weight, or on a tensor that was computed from it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if not _may_read_values(func):
            return result
        if func is Tensor.detach and _frame(1).f_code is _NEW_PARAMETER:
            return _as_parameter(args[0], result)
        _used(func, args, kwargs or {}, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _as_plain(self):
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _as_plain(self):
            return self.__reduce_ex__(protocol)


@contextmanager
def _as_plain(tensor: Any) -> Iterator[None]:
    """Restores a tensor's class while it is copied or pickled."""
    reading = type(tensor)
    try:
        tensor.__class__ = next(kind for kind, other in _KINDS.items() if other is reading)
        yield
    finally:
        if id(tensor) in _marks:
            tensor.__class__ = reading


class _ReadTensor(_Reading, Tensor):
    pass


class _ReadParameter(_Reading, nn.Parameter):
    pass


_KINDS: dict[Any, Any] = {Tensor: _ReadTensor, nn.Parameter: _ReadParameter}


def _used(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    if func in FUNCTIONS:  # the convolution key sees it
        return
    marks = [mark for mark in map(_mark_of, _tensors((*args, *kwargs.values()))) if mark is not None]
    if not marks:
        return
    name, first = function_name(func), next(iter((*args, *kwargs.values())))
    for mark in marks:
        tensor = mark.tensor()
        if tensor is None or not _reads_values(func, is_first=first is tensor):
            continue
        if name.rpartition(".")[2] not in _PASSING_ON:
            where = mark.where
            if where is not None:
                for who, layer in mark.readers:
                    who.weight_used(layer, Read(name, *where))
        for made in _tensors(result if isinstance(result, (tuple, list)) else (result,)):
            if made.numel() == tensor.numel():  # still a weight; activations are not followed
                follow(made, mark.readers, mark.where)


_NEW_PARAMETER = nn.Parameter.__new__.__code__


def _as_parameter(made_of: Any, detached: Tensor) -> Tensor:
    """Makes the result of ``nn.Parameter(weight)``.

    For now, its class must be the class of the argument.
    """
    parameter = Tensor._make_subclass(nn.Parameter, detached)
    mark, readers = _Mark(parameter, None), _mark_of(made_of)
    mark.is_new, mark.readers = True, [] if readers is None else list(readers.readers)
    with _lock:
        _marks[id(parameter)] = mark
        parameter.__class__ = type(made_of)
    return parameter


def _mark_of(tensor: Any) -> _Mark | None:
    mark = _marks.get(id(tensor))
    return mark if mark is not None and mark.tensor() is tensor and not mark.is_new else None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among some values, and in their lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        items = value if type(value) in (list, tuple) else (value,)
        found.extend(item for item in items if isinstance(item, Tensor))
    return found


def _may_read_values(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return func in _GETTERS if name == "__get__" else name not in _METADATA


def _reads_values(func: Any, *, is_first: bool) -> bool:
    """Returns whether a function reads the values of a tensor argument.

    Args:
        func: a function that may read values.
        is_first: whether the tensor is its first argument.
    """
    name = getattr(func, "__name__", "")
    if not is_first:
        return bool(name != "to")
    return not name.endswith("_") or name.endswith("__")


@functools.lru_cache(256)  # torch takes 20 µs to look up a name
def function_name(func: Any) -> str:
    """Returns the name of a torch function as a user writes it."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return f"Tensor.{getattr(getattr(func, '__self__', None), '__name__', name)}"
    return str(torch.overrides.resolve_name(func) or name)
