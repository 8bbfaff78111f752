"""Walks and rebuilds structures of tensors: tuples, lists, mappings, dataclasses."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)


class Omitted:
    """Replaces an object in a layer's output that was not kept.

    convtap keeps only tensors and plain values.
    """

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<not kept: {self.kind}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Omitted) and other.kind == self.kind

    def __hash__(self) -> int:
        return hash(self.kind)


def map_leaves(
    function: Callable[[Any], Any], value: Any, leaf: type = Tensor, other: Callable[[Any], Any] | None = None
) -> Any:
    """Applies a function to each leaf of a structure. Returns a like structure.

    Plain values stay. An object of another type becomes ``Omitted``, or the result of ``other``.
    """
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [map_leaves(function, item, leaf, other) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_leaves(function, item, leaf, other) for item in value]
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {key: map_leaves(function, item, leaf, other) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            item = map_leaves(function, getattr(value, field.name), leaf, other)
            object.__setattr__(copy, field.name, item)
        return copy
    if isinstance(value, (*_PLAIN, Omitted, Tensor)):
        return value
    return Omitted(type(value).__name__) if other is None else other(value)


def read(value: Any, key: str) -> Any:
    """Returns a structure in which each ``Held`` is replaced by its tensor."""
    return map_leaves(lambda held: held.read(key), value, Held)


def _rebuild_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return items
    try:
        return type(original)(**items) if dataclasses.is_dataclass(original) else type(original)(items)  # type: ignore[call-arg]
    except Exception:
        return items


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the items of a structure with their places: ``[0]``, ``[hidden]``."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (tuple, list)):
        pairs = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif isinstance(value, Mapping):
        pairs = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for name, item in pairs:
        yield f"[{name}]", item


def walk_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each leaf of a structure with its path.

    Paths are ``""``, ``"[0]"`` or ``"[hidden][1]"``. A part of a layer's output is written as the layer's name or key and the
    path: ``lstm[1][0]``.
    """
    if isinstance(value, (tuple, list, Mapping)) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        for place, item in _members(value):
            yield from walk_leaves(item, path + place)
    else:
        yield path, value


def walk_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor of a structure with its path, as in ``walk_leaves``."""
    if isinstance(value, Tensor):
        yield "", value
        return
    for path, leaf in walk_leaves(value):
        if isinstance(leaf, Tensor):
            yield path, leaf


class Leaves:
    """The tensors of a structure, with a method to rebuild the structure.

    Attributes:
        structure: the structure.
        paths: the path of each tensor: ``""``, ``"[0]"``, ``"[hidden][1]"``.
        tensors: the tensors, in the same order.
    """

    __slots__ = ("paths", "structure", "tensors")

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        if isinstance(structure, Tensor):
            self.paths, self.tensors = [""], [structure]
        else:
            found = list(walk_tensors(structure))
            self.paths, self.tensors = [path for path, _ in found], [tensor for _, tensor in found]

    def rebuild(self, values: Iterable[Any], other: Callable[[Any], Any] | None = None) -> Any:
        """Returns a like structure with ``values`` instead of the tensors.

        See ``map_leaves`` for ``other``.
        """
        following = iter(values)
        return map_leaves(lambda _: next(following), self.structure, other=other)


class Missing:
    """The result for a part that a structure does not have."""


MISSING = Missing()


def _below(part: str, place: str) -> str | None:
    """Returns the rest of a path after a place, or None if it begins elsewhere."""
    rest = part.removeprefix(place)
    return rest if part.startswith(place) and (not rest or rest.startswith("[")) else None


def part_of(value: Any, part: str) -> Any:
    """Returns the part at a path such as ``"[hidden][1]"``, or ``MISSING``."""
    if not part:
        return value
    for place, item in _members(value):
        rest = _below(part, place)
        found = MISSING if rest is None else part_of(item, rest)
        if found is not MISSING:
            return found
    return MISSING


def with_part(value: Any, part: str, new: Any) -> Any:
    """Returns a structure with one part replaced, or ``MISSING`` without that part."""
    if not part:
        return new
    items = [item for _, item in _members(value)]
    for number, (place, item) in enumerate(_members(value)):
        rest = _below(part, place)
        changed = MISSING if rest is None else with_part(item, rest, new)
        if changed is not MISSING:
            items[number] = changed
            return _rebuilt(value, items)
    return MISSING


def _rebuilt(value: Any, items: list[Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, dict(zip(value, items, strict=True)))
    copy = object.__new__(type(value))
    for field, item in zip(dataclasses.fields(value), items, strict=True):
        object.__setattr__(copy, field.name, item)
    return copy


class Held:
    """A tensor that is available through ``read``, which may wait or fail."""

    __slots__ = ()

    def read(self, key: str) -> Tensor:
        """Returns the tensor. Errors name its call by ``key``."""
        raise NotImplementedError
