"""Fingerprints of the model, the functions and the options, for resumed runs."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convtap._errors import StoreError, Unsupported, listed
from convtap._select.module_tree import ModuleTree


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:24]


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Describes the classes, parameters and buffers of a model.

    Each tensor is described by its dtype, its shape and a hash of its values.
    """
    tree = ModuleTree(model)
    classes = [f"{name}: {_class_name(module)}({_settings(module)})" for name, module in tree.names.items()]
    return {
        "class": _class_name(tree.names.get("(root)", model)),
        "modules": _digest(line.encode() for line in classes),
        "tensors": {name: _describe(tensor) for name, tensor in _tensors(tree)},
    }


def _class_name(module: nn.Module) -> str:
    # without the Python module: a script's is ``__main__`` when it is run, and another when a worker imports it
    return type(module).__qualname__


def _settings(module: nn.Module) -> str:
    """Returns the settings of torch's own modules, equal in every process."""
    return module.extra_repr() if type(module).__module__.startswith("torch.nn.") else ""


def _tensors(tree: ModuleTree) -> Iterable[tuple[str, Tensor]]:
    for name, module in tree.names.items():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                if is_lazy(tensor):
                    raise Unsupported(
                        f"{name}.{key} of a lazy module is not initialized yet. Run the model once before extract: model(x)."
                    )
                yield f"{name}.{key}", tensor


def _describe(tensor: Tensor) -> str:
    about = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    return f"{about} {_values(tensor)}"


def _values(tensor: Tensor) -> str:
    values = raw_bytes(tensor)
    if values is None:
        return f"{type(tensor).__name__}"
    return _digest([values] if len(values) else [])  # type: ignore[list-item]


def raw_bytes(tensor: Tensor) -> memoryview | None:
    """Returns the bytes of a tensor's values, or None if it has none of its own."""
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    values = tensor.detach()
    values = values.int_repr() if values.is_quantized else values
    values = values.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(values.view(torch.uint8).numpy()) if values.numel() else memoryview(b"")  # type: ignore[arg-type]


def function_identity(function: Any) -> str | None:
    """Names a function and hashes its code and closure; returns None for None.

    Two functions with the same code in the same Python version are equal. Other objects in a closure count by their type only.
    """
    if function is None:
        return None
    return f"{_name(function)} {_digest(_code(function))}"


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"partial({_name(function.func)})"
    name: str = function.__qualname__ if hasattr(function, "__qualname__") else type(function).__qualname__
    return name


def _code(function: Any) -> Iterable[bytes]:
    if isinstance(function, functools.partial):
        yield from _code(function.func)
        yield from _constant((function.args, function.keywords))
        return
    if isinstance(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        call = type(function).forward if isinstance(function, nn.Module) else type(function).__dict__.get("__call__")
        if isinstance(function, nn.Module):
            yield from (f"{name} {_describe(tensor)}".encode() for name, tensor in function.state_dict().items())
        if isinstance(call, types.FunctionType):
            yield from _code(call)
        return
    yield from _constant(function.__code__)
    yield from _constant((function.__defaults__, function.__kwdefaults__))
    for cell in function.__closure__ or ():
        yield from _constant(cell.cell_contents)


def _constant(value: Any) -> Iterable[bytes]:
    if isinstance(value, types.CodeType):
        yield value.co_code
        yield " ".join(value.co_names).encode()
        for constant in value.co_consts:
            yield from _constant(constant)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _constant(item)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(repr(item).encode() for item in value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _constant(item)
    elif isinstance(value, (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, slice)):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield _describe(value).encode()
    elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        yield from _code(value)
    else:
        yield type(value).__qualname__.encode()


# -- comparing

_WHAT: dict[str, Callable[[Any], str]] = {
    "layers": lambda value: listed(value),
    "data": lambda value: ", ".join(f"{key} {item}" for key, item in value.items() if item is not None),
}


def check_same(stored: Mapping[str, Any] | None, now: Mapping[str, Any], where: str) -> None:
    """Compares the identity of a store with that of this call.

    Args:
        stored: the identity of the store; None if it was not begun yet.
        now: the identity of this call.
        where: the store, for the message.

    Raises:
        StoreError: they differ. The message names each difference.
    """
    if stored is None:
        return
    differences = []
    for key in dict.fromkeys([*stored, *now]):
        before, after = stored.get(key), now.get(key)
        if before == after or key not in stored:  # a store of an earlier version lacks it
            continue
        if key == "model":
            differences.append(_model_difference(before or {}, after or {}))
        elif key == "reduce":
            differences.append(_reduce_difference(before, after))
        else:
            show = _WHAT.get(key, repr)
            differences.append(f"{key}: {show(before)} then, {show(after)} now")
    if differences:
        raise StoreError(
            f"{where} was begun with other arguments: {'; '.join(differences)}. Pass another directory, or the same arguments "
            "as before."
        )


def _reduce_difference(before: Any, after: Any) -> str:
    """Describes how two functions differ, or two mappings from layers to functions."""
    if isinstance(before, dict) and isinstance(after, dict):
        key = next(key for key in [*before, *after] if before.get(key) != after.get(key))
        return f"reduce of {key!r}: {_reduce_difference(before.get(key), after.get(key)).removeprefix('reduce: ')}"
    then, now = (_reduce_name(value) for value in (before, after))
    if then == now:
        return f"reduce: the code of {then} has changed (with reduce_id=, convtap compares a name instead)"
    return f"reduce: {then} then, {now} now"


def _reduce_name(value: Any) -> str:
    if isinstance(value, dict):
        return f"one for each of {listed(value, 3)}"
    return "none" if value is None else str(value).split(" ")[0]


def _model_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before.get("class") != after.get("class"):
        return f"the model: {before.get('class')} then, {after.get('class')} now"
    old, new = before.get("tensors", {}), after.get("tensors", {})
    if old.keys() != new.keys():
        gone, come = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        return f"the model's parameters: only then {listed(gone, 3)}, only now {listed(come, 3)}"
    changed = [name for name in old if old[name] != new[name]]
    if not changed:
        return "the model: its modules have other classes or settings"
    name = changed[0]
    (then, _, _), (now, _, _) = old[name].rpartition(" "), new[name].rpartition(" ")
    if then != now:
        return f"the model: {name} is {then} then, {now} now"
    return f"the model: {len(changed)} of {len(old)} parameters and buffers have other values, {name} first"
