"""Activations on disk, in one safetensors file: the tensors under numbers, and what they are in the metadata."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convtap._call import Call, Tally
from convtap._errors import StoreError
from convtap._layout import Layout
from convtap._log import Log
from convtap._structure import Omitted

if TYPE_CHECKING:
    from convtap._result import Activations

_FORMAT = 1
_COMPLEX = {"complex32", "complex64", "complex128"}


def save(acts: Activations, path: str | os.PathLike[str]) -> None:
    """Writes what was collected: to a temporary name, then renamed, so that a file of this name is always whole."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    calls = [_describe(call, tensors) for call in acts.calls()]
    log = acts._log
    about = {name: {"is_conv1d": tally.is_conv1d, "layout": tally.layout} for name, tally in log.tallies.items()}
    content = {
        "format": _FORMAT,
        "calls": calls,
        "layers": [{**asdict(state), **about.get(state.name, {"is_conv1d": False})} for state in log.states()],
        "inputs": [[number, shape] for number, shape in log.inputs.items()],
        "aliases": log.aliases,
        "notes": log.notes,
    }
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise StoreError(
            f"cannot write to {str(target)!r}: {error}. Give a path in an existing, writable folder."
        ) from error
    try:
        save_file(tensors, temporary, metadata={"convtap": json.dumps(content)})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(f"cannot write to {str(target)!r}: {error}.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Activations:
    """Reads what ``Activations.save`` wrote: the same outputs in the same order, on the CPU.

    Raises:
        StoreError: there is no such file, or it is not whole, or it was not written by ``save``.
    """
    from safetensors import SafetensorError, safe_open

    from convtap._result import Activations

    try:
        with safe_open(str(path), framework="pt") as file:
            content = _content(path, file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except FileNotFoundError:
        raise StoreError(f"there is no file {str(path)!r}. acts.save(path) writes one.") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StoreError(
            f"{str(path)!r} cannot be read: {error}. It is not whole, or not a safetensors file."
        ) from error
    try:
        return Activations(_rebuild(content, tensors))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{str(path)!r} does not describe its calls as acts.save() does: {error!r}.") from error


def _content(path: Any, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get("convtap")
    if text is None:
        raise StoreError(f"{str(path)!r} is a safetensors file, but acts.save() did not write it: it holds no calls.")
    content: dict[str, Any] = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise StoreError(f"{str(path)!r} says nothing of its format, so acts.save() did not write it.")
    if content["format"] > _FORMAT:
        raise StoreError(
            f"{str(path)!r} has format {content['format']}, and this convtap reads up to {_FORMAT}: update convtap."
        )
    return content


def _rebuild(content: dict[str, Any], tensors: dict[str, Tensor]) -> Log:
    log = Log(
        selected=tuple(layer["name"] for layer in content["layers"]),
        inputs={number: None if shape is None else tuple(shape) for number, shape in content["inputs"]},
        aliases=[(alias, clean) for alias, clean in content["aliases"]],
        notes=list(content["notes"]),
    )
    for layer in content["layers"]:
        name, is_conv1d, layout = layer.pop("name"), layer.pop("is_conv1d"), layer.pop("layout", None)
        if any(layer.values()):
            tally = log.tallies[name] = Tally(name, nn.Conv1d if is_conv1d else nn.Module)
            tally.layout = None if layout is None else Layout(*layout)
            tally.ran = layer["captured"] + layer.pop("unactivated")
            for key, value in layer.items():
                setattr(tally, key, value)
    for saved in content["calls"]:
        tally = log.tallies[saved["name"]]
        tally.held += 1
        log.changes += 1
        value = _decode(saved["value"], tensors)
        log.calls[log.changes] = Call(tally, saved["index"], saved["forward"], saved["via"], value)
    return log


def _describe(call: Call, tensors: dict[str, Tensor]) -> dict[str, Any]:
    value = _encode(call.output, tensors, call.key)
    return {
        "name": call.name,
        "index": call.index,
        "forward": call.forward,
        "via": call.via,
        "value": value,
    }


def _encode(value: Any, tensors: dict[str, Tensor], key: str) -> Any:
    if isinstance(value, Tensor):
        return _encode_tensor(value, tensors, key)
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        names = getattr(value, "_fields", None)
        items = [_encode(item, tensors, key) for item in value]
        return {"mapping": dict(zip(names, items, strict=True))} if names else {kind: items}
    if isinstance(value, Mapping):
        return {"pairs": [[_encode(name, tensors, key), _encode(item, tensors, key)] for name, item in value.items()]}
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return _encode(fields, tensors, key)
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    return {"omitted": value.kind if isinstance(value, Omitted) else type(value).__name__}


def _encode_tensor(tensor: Tensor, tensors: dict[str, Tensor], key: str) -> Any:
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.device.type == "meta":
        what = (
            "quantized" if tensor.is_quantized else "on 'meta'" if tensor.device.type == "meta" else str(tensor.layout)
        )
        raise StoreError(
            f"the output of {key!r} is {what}, which safetensors has no form for. Capture it with "
            "reduce=lambda t: t.dequantize() (or t.to_dense()), or save the other layers only."
        )
    number = f"{len(tensors):06d}"
    values = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(values.dtype).removeprefix("torch.")
    tensors[number] = (torch.view_as_real(values) if values.is_complex() else values).clone(
        memory_format=torch.contiguous_format
    )
    return {"tensor": number, **({"complex": True} if name in _COMPLEX else {})}


def _decode(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return torch.view_as_complex(tensor) if value.get("complex") else tensor
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    if "list" in value:
        return [_decode(item, tensors) for item in value["list"]]
    if "pairs" in value:
        return {_decode(name, tensors): _decode(item, tensors) for name, item in value["pairs"]}
    if "mapping" in value:
        return {key: _decode(item, tensors) for key, item in value["mapping"].items()}
    return value["plain"] if "plain" in value else Omitted(value["omitted"])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
