"""Writes and reads outputs as one safetensors file.

The tensors have numbers as keys, and the metadata describes them.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import os
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtap._atomic_write import write_whole
from convtap._errors import InvalidValue, StoreError, Unsupported
from convtap._result.call import Call, LayerRecord, given_of
from convtap._result.log import Log
from convtap._result.origin import Origin
from convtap._spelling import is_utf8
from convtap._tensors.layout import Layout
from convtap._tensors.memory import has_no_values
from convtap._tensors.nested import MISSING, Omitted
from convtap._tensors.statistics import ordinary

_FORMAT = 2
_COMPLEX = {"complex32", "complex64", "complex128"}


def write(log: Log, path: str | os.PathLike[str]) -> None:
    """Writes a log to a file, which gets its name only when it is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    check_path(target)
    tensors: dict[str, Tensor] = {}
    calls = [_describe(call, tensors) for call in log.calls.values()]
    about = {name: {"is_conv1d": record.is_conv1d, "layout": record.layout} for name, record in log.records.items()}
    content = {
        "format": _FORMAT,
        "calls": calls,
        "layers": [
            {**dataclasses.asdict(state), **about.get(state.name, {"is_conv1d": False}), **_part(log, state.name)}
            for state in log.states()
        ],
        "inputs": [[number, shape] for number, shape in log.inputs.items()],
        "unclear": [[number, why, first] for number, (why, first) in log.unclear.items()],
        "aliases": log.aliases,
        "notes": log.notes,
        "origin": None if log.origin is None else dataclasses.asdict(log.origin),
    }
    try:
        write_whole(target, lambda temporary: save_file(tensors, temporary, metadata={"convtap": json.dumps(content)}))
    except (OSError, SafetensorError) as error:
        raise StoreError(unwritable(target, error)) from error


def read(path: str | os.PathLike[str]) -> Log:
    """Reads a log from a file that ``write`` wrote; see ``convtap.load``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            content = _content(path, file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except FileNotFoundError:
        raise StoreError(f"the file {str(path)!r} does not exist. Write it with acts.save(path).") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StoreError(
            f"{str(path)!r} cannot be read as a safetensors file: {error}. Write it again with acts.save(path)."
        ) from error
    try:
        return _rebuild(content, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"the metadata of {str(path)!r} does not describe its calls: {error!r}. Write the file again with acts.save(path)."
        ) from error


def _content(path: Any, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get("convtap")
    if text is None:
        raise StoreError(
            f"{str(path)!r} is a safetensors file without calls, since acts.save(path) did not write it. Read its tensors with "
            "safetensors.torch.load_file(path)."
        )
    content: dict[str, Any] = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise StoreError(
            f"the metadata of {str(path)!r} has no format number, so acts.save(path) did not write it. Pass another file."
        )
    if content["format"] > _FORMAT:
        raise StoreError(
            f"{str(path)!r} has format {content['format']}, but this convtap reads formats up to {_FORMAT}. Update it: "
            "pip install -U convtap."
        )
    return content


def _rebuild(content: dict[str, Any], tensors: dict[str, Tensor]) -> Log:
    log = Log(
        selected=dict.fromkeys(layer["name"] for layer in content["layers"]),
        inputs={number: None if shape is None else tuple(shape) for number, shape in content["inputs"]},
        unclear={number: (why, first) for number, why, first in content.get("unclear", [])},
        aliases=[(alias, clean) for alias, clean in content["aliases"]],
        notes=list(content["notes"]),
        origin=None if content.get("origin") is None else Origin(**content["origin"]),
    )
    for layer in content["layers"]:
        name, is_conv1d, part = layer.pop("name"), layer.pop("is_conv1d"), layer.pop("part", "")
        layout = layer.pop("layout", None)
        if any(layer.values()):
            record = log.records[name] = LayerRecord(name, bool(is_conv1d), part)
            record.layout = None if layout is None else Layout(*layout)
            record.ran = layer["captured"] + layer.pop("unactivated")
            for key, value in layer.items():
                setattr(record, key, value)
    for saved in content["calls"]:
        record = log.records[saved["name"]]
        record.held += 1
        value = _decode(saved["value"], tensors)
        given = _decode(saved["input"], tensors) if "input" in saved else MISSING
        log.calls[len(log.calls)] = Call(record, saved["index"], saved["forward"], saved["via"], value, None, given)
    return log


def _part(log: Log, name: str) -> dict[str, str]:
    part = log.records[name].part if name in log.records else ""
    return {"part": part} if part else {}


def _describe(call: Call, tensors: dict[str, Tensor]) -> dict[str, Any]:
    value = _encode(call.output, tensors, call.key)
    given = {} if given_of(call) is MISSING else {"input": _encode(call.input, tensors, call.key)}
    return {
        **given,
        "name": call.name,
        "index": call.index,
        "forward": call.forward,
        "via": call.via,
        "value": value,
    }


# Note: [Structures in files]
# Assumption: a layer may return a named tuple (such as a PackedSequence), a dataclass, or a dict subclass (ModelOutput).
# Failure: a named tuple that is stored as a plain dict has no positions after ``load``. Importing or calling the class that
#   a file names would run code that the file chooses.
# Choice: a file holds the names of the class and its fields. If a class of this name with these fields is imported already,
#   ``load`` fills an instance of it without calling the class. Otherwise it makes a named tuple with these fields, or a dict
#   for a ModelOutput. A dataclass becomes a dict of its fields, and any other mapping a dict.


def _encode(value: Any, tensors: dict[str, Tensor], key: str) -> Any:
    def many(values: Iterable[Any]) -> list[Any]:
        return [_encode(item, tensors, key) for item in values]

    if isinstance(value, Tensor):
        return _encode_tensor(value, tensors, key)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"named": _class_name(value), "fields": list(value._fields), "items": many(value)}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": many(value)}
    if isinstance(value, Mapping):
        pairs = [many(pair) for pair in value.items()]
        return {"pairs": pairs, **({"class": _class_name(value)} if dataclasses.is_dataclass(value) else {})}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _encode(fields, tensors, key)
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if isinstance(value, complex):
        return {"number": [value.real, value.imag]}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return {"omitted": value.kind if isinstance(value, Omitted) else type(value).__name__}


def _class_name(value: Any) -> list[str]:
    return [type(value).__module__, type(value).__qualname__]


def _encode_tensor(tensor: Tensor, tensors: dict[str, Tensor], key: str) -> Any:
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_nested or has_no_values(tensor):
        what = "quantized" if tensor.is_quantized else "on 'meta'" if has_no_values(tensor) else str(tensor.layout)
        what = "nested" if tensor.is_nested else what
        dense = "torch.nested.to_padded_tensor(t, 0.0)" if tensor.is_nested else "t.dequantize() (or t.to_dense())"
        raise StoreError(
            f"the output of {key!r} is {what}, which safetensors cannot store. Capture it with "
            f"reduce=lambda t: {dense}, or capture only the other layers."
        )
    try:
        tensor = ordinary(tensor.detach(), key)
    except Unsupported as error:
        raise StoreError(str(error)) from error
    number = f"{len(tensors):06d}"
    values = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(values.dtype).removeprefix("torch.")
    tensors[number] = (torch.view_as_real(values) if values.is_complex() else values).clone(
        memory_format=torch.contiguous_format
    )
    return {"tensor": number, **({"complex": True} if name in _COMPLEX else {})}


def _decode(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    def many(values: list[Any]) -> list[Any]:
        return [_decode(item, tensors) for item in values]

    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return torch.view_as_complex(tensor) if value.get("complex") else tensor
    if "named" in value:
        return _named_tuple(value["named"], value["fields"], many(value["items"]))
    if "tuple" in value:
        return tuple(many(value["tuple"]))
    if "list" in value:
        return many(value["list"])
    if "pairs" in value:
        return _mapping(value.get("class"), dict(map(many, value["pairs"])))
    if "mapping" in value:  # a named tuple, in format 1
        return _named_tuple(["", "Named"], list(value["mapping"]), many(list(value["mapping"].values())))
    if "number" in value:
        return complex(*value["number"])
    if "dtype" in value:
        return _dtype(value["dtype"])
    if "device" in value:
        return torch.device(value["device"])
    return value["plain"] if "plain" in value else Omitted(value["omitted"])


def _named_tuple(name: list[str], fields: list[str], items: list[Any]) -> Any:
    kind: Any = _imported(name)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and getattr(kind, "_fields", None) == tuple(fields)):
        kind = _made(_plain_name(name), fields, rename=True)
    if len(items) != len(fields):
        raise ValueError(f"{len(fields)} fields and {len(items)} items")
    return tuple.__new__(kind, items)


_made: Any = namedtuple


def _mapping(name: list[str] | None, items: dict[Any, Any]) -> Any:
    """Returns a ``ModelOutput`` if its class is imported, else a dict."""
    kind: Any = None if name is None else _imported(name)
    if not (isinstance(kind, type) and issubclass(kind, OrderedDict) and dataclasses.is_dataclass(kind)):
        return items
    names = [field.name for field in dataclasses.fields(kind)]
    if not set(items) <= set(names):
        return items
    found: Any = OrderedDict.__new__(kind)
    for field in names:
        object.__setattr__(found, field, items.get(field))
    for key, item in items.items():
        OrderedDict.__setitem__(found, key, item)
    return found


def _imported(name: list[str]) -> Any:
    """Returns an object by its name, if its module is imported already, else None."""
    module, path = name
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # getattr alone could run code
    return found


def _plain_name(name: list[str]) -> str:
    last = name[1].rpartition(".")[2]
    return last if last.isidentifier() and not keyword.iskeyword(last) else "Named"


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    return found


def check_path(path: Path) -> None:
    """Checks that safetensors can read a file back from a path.

    Raises:
        InvalidValue: the path is not UTF-8.
    """
    if not is_utf8(str(path)):
        raise InvalidValue(
            f"the path {str(path)!r} is not UTF-8, and safetensors reads no such file. Rename its folder, or pass another path."
        )


def unwritable(target: Path, error: Exception) -> str:
    """Returns the message for a file that cannot be written."""
    in_use = " and close programs that read the file" if isinstance(error, PermissionError) and target.is_file() else ""
    return f"the file {str(target)!r} cannot be written: {error}. Pass a path in an existing, writable folder{in_use}."
