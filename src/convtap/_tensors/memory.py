"""Finds the memory under tensors and the tensors that share it, and parses sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue
from convtap._tensors.nested import walk_tensors
from convtap._torch.storage import start_address, storage_number


def data_address(tensor: Tensor) -> int:
    """Returns the address of a tensor's first element, or 0 if it has none.

    The call does not end copy-on-write.
    """
    base = start_address(tensor)
    return base + int(tensor.storage_offset()) * tensor.element_size() if base else 0


def storage_key(tensor: Tensor) -> tuple[int, int] | None:
    """Returns (start address, bytes) of a tensor's storage, or None.

    The result is None if the tensor has no plain storage. Copy-on-write siblings have the same key while they share memory.
    """
    try:
        address = start_address(tensor)
        size = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return None
    if address == 0:
        return (0, 0)
    return (address, int(size))


def parts(tensor: Tensor) -> list[Tensor]:
    """Returns the plain tensors that a tensor consists of.

    These are the tensor itself, the indices and values of a sparse tensor, or the tensors inside a wrapper at any depth (a
    DTensor, a jagged tensor, a quantized or masked subclass).
    """
    if type(tensor) not in _PLAIN:
        held = _held(tensor)
        if held:
            return list({id(part): part for inner in held for part in parts(inner)}.values())
    layout = tensor.layout
    if layout is torch.strided:
        return [tensor]
    if layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


_PLAIN = (Tensor, torch.nn.Parameter)


def _held(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors inside a wrapper, or an empty list for an ordinary tensor."""
    try:
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return [inner for name in names if isinstance(inner := getattr(tensor, name), Tensor)]
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        pass
    if start_address(tensor) or has_no_values(tensor):
        return []
    return [inner for _, inner in walk_tensors(vars(tensor)) if inner is not tensor]  # the wrapper cannot be flattened


def has_no_values(tensor: Tensor) -> bool:
    """Returns whether a tensor is a meta or fake tensor, which has no memory."""
    try:
        return tensor.is_meta or tensor.untyped_storage().device.type == "meta"
    except (RuntimeError, NotImplementedError):
        return False


def tensor_bytes(tensor: Tensor) -> int:
    """Returns the number of bytes of a tensor's own elements, in all of its parts."""
    return sum(part.numel() * part.element_size() for part in parts(tensor))


def memory_of(tensor: Tensor) -> dict[tuple[str, int], int]:
    """Returns the bytes of each storage under a tensor, by (device, address).

    A meta tensor has no storage.
    """
    found: dict[tuple[str, int], int] = {}
    for part in parts(tensor):
        key = storage_key(part)
        if key is None:
            found[("", id(part))] = part.numel() * part.element_size()
        elif key[1]:
            found[(str(part.device), key[0])] = key[1]
    return found


def shares_memory(these: Iterable[Tensor], tensors: Iterable[Tensor]) -> bool:
    """Returns whether any tensor of ``these`` shares storage with any of ``tensors``."""
    try:
        storages = {storage_number(tensor) for tensor in tensors}
        return any(storage_number(tensor) in storages for tensor in these)
    except (RuntimeError, NotImplementedError):
        return True


def are_separate(tensors: list[Tensor], these: list[Tensor]) -> bool:
    """Returns whether ``these`` share no storage with other tensors of ``tensors``."""
    try:
        storages = [storage_number(tensor) for tensor in tensors]
        return all(storages.count(storage_number(tensor)) == 1 for tensor in these)
    except (RuntimeError, NotImplementedError):
        return False


_UNITS = {"": 1, "B": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(value: Any, name: str) -> int:
    """Parses a number of bytes.

    The value is an int, or text such as ``"2GB"`` (decimal) or ``"512MiB"`` (binary).

    Raises:
        InvalidType: if the value is neither a number nor text.
        InvalidValue: if the unit does not exist, or if the value is less than one byte.
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
            raise InvalidValue(f"{name}={value!r} is not a number of bytes. {hint}") from None
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        size = int(value) if abs(value) != float("inf") else 0
    else:
        raise InvalidType(f"{name} is a {type(value).__name__}, which is not a number of bytes. {hint}")
    if size < 1:
        raise InvalidValue(f"{name}={value!r} is less than one byte. {hint}")
    return size
