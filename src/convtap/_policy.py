"""What happens to one output: reduce, cast, detach, snapshot; and what a kept tensor weighs in bytes."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, ModifiedInPlace

# Note: [Copy-on-write snapshots]
# Assumption: ``torch._lazy_clone`` returns a tensor that shares memory until either side is written, and the writer
#   then copies; views made before or after write through the same storage and so count as the writer.
# Failure: it is private and not for every tensor. A quantized tensor crashes the process later; nested, sparse and
#   mkldnn tensors raise, and so does memory that torch did not allocate (``torch.from_numpy``); Dynamo cannot
#   trace it, so what is traced (``tapped``) clones.
# Choice: an allow-list (exactly ``torch.Tensor``, strided, not quantized, not nested), and ``clone`` for all else.
_lazy_clone: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)


def _works() -> bool:
    """Probes once whether copy-on-write does what Note: [Copy-on-write snapshots] assumes."""
    if _lazy_clone is None:
        return False
    original = torch.zeros(2)
    kept = _lazy_clone(original)
    original.view(-1).add_(1)
    return kept.tolist() == [0.0, 0.0] and original.tolist() == [1.0, 1.0]


_COPY_ON_WRITE = _works()
_strided = torch.strided


def snapshot(tensor: Tensor) -> Tensor:
    """Returns a tensor with the value of ``tensor`` now, whatever is written into ``tensor`` later."""
    if (
        _COPY_ON_WRITE
        and type(tensor) is Tensor
        and tensor.layout is _strided
        and not tensor.is_quantized
        and not tensor.is_nested
    ):
        try:
            return _lazy_clone(tensor)  # type: ignore[misc]
        except RuntimeError:  # memory that torch did not allocate itself
            pass
    return tensor.clone()


def data_address(tensor: Tensor) -> int:
    """Returns where a tensor's first element lies, without ending copy-on-write; 0 if it lies nowhere."""
    try:
        return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return 0


def storage_key(tensor: Tensor) -> tuple[int, int] | None:
    """Returns what identifies the memory under a tensor (start address, bytes), or None if it has no plain storage.

    Copy-on-write siblings have the same key for as long as they share memory.
    """
    try:
        address = data_address(tensor)
        size = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return None
    if address == 0:
        return (0, 0)
    return (address - int(tensor.storage_offset()) * tensor.element_size(), size)


def tensor_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's own elements (indices and values for a sparse one)."""
    if tensor.layout is torch.sparse_coo:
        return tensor_bytes(tensor._indices()) + tensor_bytes(tensor._values())
    return tensor.numel() * tensor.element_size()


class Omitted:
    """Stands where a layer's output held an object that is neither a tensor nor a plain value, and so was not kept."""

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
    """Applies a function to each leaf in a structure of tuples, lists, mappings and dataclasses; keeps the structure.

    Objects of other types become ``Omitted``, or what ``other`` makes of them; plain values stay.
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
    """Returns what was kept, its Held tensors read."""
    return map_leaves(lambda held: held.read(key), value, Held)


def _rebuild_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return items
    try:
        return type(original)(**items) if dataclasses.is_dataclass(original) else type(original)(items)  # type: ignore[call-arg]
    except Exception:
        return items


def walk_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a structure with its path in it: ``""``, ``"0"``, ``"hidden.1"``."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
        pairs = zip(names, value, strict=True)
    elif isinstance(value, Mapping):
        pairs = ((str(key), item) for key, item in value.items())  # type: ignore[assignment]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))  # type: ignore[assignment]
    else:
        return
    for name, item in pairs:
        yield from walk_tensors(item, f"{path}.{name}" if path else str(name))


class Held:
    """A tensor that must be asked for: reading it may wait, or refuse."""

    __slots__ = ()

    def read(self, key: str) -> Tensor:
        """Returns the tensor; ``key`` names its call in an error."""
        raise NotImplementedError


class Alias(Held):
    """A tensor kept as it is, with the version at which it was kept."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def read(self, key: str) -> Tensor:
        """Returns the tensor, or raises ModifiedInPlace if it was written since."""
        changes = self.tensor._version - self.version
        if changes:
            raise ModifiedInPlace(
                f"{key!r} was kept as an alias and the model changed it in place since "
                f"({changes} {'time' if changes == 1 else 'times'}), so the value it had is lost. "
                "Capture with copy=True (the default) to keep the value."
            )
        return self.tensor


def alias(tensor: Tensor) -> Any:
    """Keeps a tensor as an alias; one without a version counter (inference mode) as a snapshot instead."""
    return snapshot(tensor) if tensor.is_inference() else Alias(tensor)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to do with each output. Pure: applying it changes neither the policy nor the model's tensor.

    Attributes:
        detach: keep no autograd graph.
        copy: keep a value that later in-place operations do not change.
        reduce: a function of the output, applied first.
        dtype: what to cast floating and complex tensors to, after ``reduce``.
    """

    detach: bool = True
    copy: bool = True
    reduce: Callable[[Any], Any] | None = None
    dtype: torch.dtype | None = None

    @property
    def is_plain(self) -> bool:
        """Whether an output only needs to be detached and snapshotted (the common case, which has a short path)."""
        return self.detach and self.copy and self.reduce is None and self.dtype is None

    @property
    def transforms(self) -> bool:
        """Whether what is kept is computed from the output, and so is not the output itself."""
        return self.reduce is not None or self.dtype is not None

    def keep_input(self, tensor: Tensor) -> Any:
        """Keeps a tensor that the layer did not make, so its memory may be anyone's: a real copy, or an alias."""
        if self.transforms:
            tensor = tensor.detach() if self.detach else tensor
            return self._transform(tensor.clone() if self.copy else tensor)
        if self.detach:
            tensor = tensor.detach()
            return tensor.clone() if self.copy else alias(tensor)
        return alias(tensor)

    def keep_output(self, tensor: Tensor) -> Any:
        """Keeps an output that the model goes on with."""
        if self.transforms:
            return self._transform(snapshot(tensor.detach() if self.detach else tensor))
        if tensor.requires_grad:
            if not self.detach:
                return alias(tensor)
            tensor = tensor.detach()
        return snapshot(tensor) if self.copy else alias(tensor)

    def swaps(self, output: Any, inputs: Any) -> bool:
        """Whether the output itself is kept, upstream of the loss, and the model goes on with a snapshot of it.

        Not where that would part tensors that share memory: an output and an input, or two tensors of one output.
        """
        if self.detach or not self.copy or self.transforms:
            return False
        tensors = [tensor for _, tensor in walk_tensors(output)]
        return (
            any(tensor.requires_grad for tensor in tensors)
            and all(type(tensor) is Tensor for tensor in tensors)
            and are_separate([*tensors, *{id(tensor): tensor for _, tensor in walk_tensors(inputs)}.values()], tensors)
        )

    def _transform(self, tensor: Tensor) -> Tensor:
        result = tensor if self.reduce is None else self.reduce(tensor)
        if self.reduce is not None and not isinstance(result, Tensor):
            raise InvalidType(
                f"reduce returned a {type(result).__name__}, and it must return a tensor. "
                "Write for example reduce=lambda t: t.mean(-1)."
            )
        if self.dtype is not None and (result.is_floating_point() or result.is_complex()):
            result = result.to(self.dtype)
        if self.detach and result.requires_grad:
            result = result.detach()
        return own(result)

    def __post_init__(self) -> None:
        if self.reduce is not None and not callable(self.reduce):
            raise InvalidType(
                f"reduce is a {type(self.reduce).__name__}, and it must be a function of a tensor: "
                "reduce=lambda t: t.mean(-1)."
            )
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InvalidType(f"dtype is {self.dtype!r}, and it must be a torch.dtype such as torch.float16.")


def own(result: Tensor) -> Tensor:
    """Makes a computed tensor safe to keep: a part of a larger storage keeps its own bytes, and no more."""
    key = storage_key(result)
    if key is not None and tensor_bytes(result) < key[1]:
        return result.clone(memory_format=torch.contiguous_format)
    return snapshot(result)


def are_separate(tensors: list[Tensor], these: list[Tensor]) -> bool:
    """Whether none of ``these`` lies in the same memory as another one of ``tensors``."""
    try:
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        return all(storages.count(tensor.untyped_storage()._cdata) == 1 for tensor in these)
    except (RuntimeError, NotImplementedError):
        return False


_UNITS = {"": 1, "B": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(value: Any, name: str) -> int:
    """Reads a number of bytes: an int, or text such as ``"2GB"`` (decimal) or ``"512MiB"`` (binary).

    Raises:
        InvalidType: neither a number nor text.
        InvalidValue: no such unit, or less than one byte.
    """
    hint = f"Write for example {name}=2_000_000_000, '2GB' or '512MiB'."
    if isinstance(value, str):
        digits = value.strip()
        number = digits.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = digits[len(number) :].strip().upper()
        unit = unit[:-1] if len(unit) > 1 and unit.endswith("B") else unit
        try:
            size = int(float(number.replace("_", "")) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise InvalidValue(f"{name}={value!r} is no number of bytes. {hint}") from None
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        size = int(value) if abs(value) != float("inf") else 0
    else:
        raise InvalidType(f"{name} is a {type(value).__name__}, and it must be a number of bytes. {hint}")
    if size < 1:
        raise InvalidValue(f"{name}={value!r} leaves no room for any output. {hint}")
    return size
