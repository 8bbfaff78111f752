"""Runs a model on an example without changing the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from convtap._errors import ConvtapError, InvalidType, InvalidValue, did_you_mean, listed, one_line
from convtap._select.model_state import untouched
from convtap._select.module_tree import ROOT, ModuleTree
from convtap._tensors.nested import map_leaves
from convtap._torch.cleanup import undone

if TYPE_CHECKING:
    import numpy as np

# Note: [Examples and batches]
# An example holds the model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
# A batch is an item of a data set or a DataLoader. It has the same forms as an example, but in a tuple or list, such as
# [x, labels] of a DataLoader, only the first element is the example. For other batches, a function ``inputs`` returns the
# arguments. In both, NumPy arrays at any depth are copied to tensors on the model's device. Arrays of floating numbers get
# the model's floating dtype.

#: A tensor or array, a tuple of positional arguments, or a mapping of keyword arguments.
Example: TypeAlias = "Tensor | np.ndarray[Any, Any] | tuple[Any, ...] | Mapping[str, Any]"


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits an example into ``(args, kwargs)``. See Note: [Examples and batches].

    Raises:
        InvalidType: if the example is not a tensor, an array, a tuple or a mapping.
    """
    if isinstance(example, Tensor) or is_array(example):
        return (example,), {}
    if isinstance(example, tuple):
        return tuple(example), {}
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return (), dict(example)
    write = "example=torch.zeros(1, 1, 16000)"
    if isinstance(example, list):
        write = "example=batch[0] for a batch [x, labels] of a DataLoader"
    raise InvalidType(
        f"example is a {type(example).__name__}. Pass a tensor, a tuple of positional arguments, or a dict of keyword "
        f"arguments: {write}."
    )


# -- tensors and arrays


def is_array(value: Any) -> bool:
    """Returns whether a value is a NumPy array, without importing NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def prepared(example: Any, model: nn.Module) -> Any:
    """Returns an example with its arrays as tensors for a model.

    The example's own tensors do not change.

    Raises:
        InvalidType: if the example is not a tensor, an array, a tuple or a mapping, or if an array has no form as a tensor.
    """
    arguments(example)
    found = with_tensors(example, model)
    if is_array(found):
        raise InvalidType(
            f"example is an array of {found.dtype}, but the model needs numbers. Convert the array first."
        )
    return dict(found) if isinstance(found, Mapping) else found


def fitted(example: Any, model: nn.Module) -> Any:
    """Returns an example with all tensors in the model's dtype and on its device."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_leaves(fit, prepared(example, model), other=_unchanged)


def moved(value: Any, device: torch.device) -> Any:
    """Returns arguments with all movable values on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value.to(device) if hasattr(value, "to") else type(value)(*(moved(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device) if hasattr(value, "to") else value


def own_tensors(example: Any) -> Any:
    """Returns an example with copied tensors, which the model may overwrite.

    A tensor that occurs twice is copied once.
    """
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return map_leaves(copied, example, other=_unchanged)


def with_tensors(value: Any, model: nn.Module) -> Any:
    """Returns a structure with its arrays as tensors, or itself if it has no arrays."""
    numpy = sys.modules.get("numpy")
    found: list[Any] = []
    if numpy is not None:
        map_leaves(found.append, value, numpy.ndarray, _unchanged)
    if numpy is None or not found:
        return value
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    floating = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    return map_leaves(lambda array: _tensor_of(array, device, dtype), value, numpy.ndarray, _unchanged)


def _tensor_of(array: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Returns a tensor with a copy of an array's values.

    An array of text or objects is returned unchanged.
    """
    import numpy

    if array.dtype.kind not in "biufc":
        return array
    if isinstance(array, numpy.ma.MaskedArray) and array.mask.any():
        raise InvalidType(
            "the input has a masked array, but a tensor has no mask. Pass array.filled(0.0), and pass the mask to the model "
            "as another argument."
        )
    kind = {"f": numpy.float64, "c": numpy.complex128}.get(array.dtype.kind) if array.dtype.itemsize > 8 else None
    native = numpy.array(array, kind or array.dtype.newbyteorder("="), order="C", subok=False)
    tensor = torch.tensor(native)
    if tensor.is_complex():
        return tensor.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _unchanged(value: Any) -> Any:
    return value


# -- one run


@contextmanager
def eval_mode(model: nn.Module, mode: str | None = "eval") -> Iterator[None]:
    """A context with a model in eval mode, which restores the mode of each module.

    Args:
        model: the model.
        mode: ``"eval"``, ``"train"`` for train mode, or None to keep the mode of each module.
    """
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]

    def restore() -> None:
        for module, training in modes:
            if module.training != training:
                module.training = training

    with undone([restore]):
        if mode == "train" or (mode == "eval" and any(training for _, training in modes)):
            model.train(mode == "train")
        yield


@contextmanager
def looking(model: nn.Module, mode: str | None = "eval") -> Iterator[None]:
    """A context with a model in a mode, without gradients, that restores the model.

    See Note: [Looking at a model].
    """
    other = mode == "train"
    training = [part for part in model.modules() if mode is not None and getattr(part, "training", other) != other]
    # A custom train or eval may write to weights (low-rank adapters merge theirs), so all weights are copied.
    own = any(type(part).train is not nn.Module.train or type(part).eval is not nn.Module.eval for part in training)
    with untouched(model, everything=own), eval_mode(model, mode):
        torch.set_grad_enabled(False)  # restored by untouched
        yield


def called(model: nn.Module, example: Any, method: str | None = None) -> Any:
    """Calls a model, or a method of it, on an example.

    Raises:
        InvalidType: if the model's forward, or the method, does not take the example's arguments.
        InvalidValue: if the model does not have the method.
    """
    args, kwargs = arguments(example)
    run = entry(model, method)
    try:
        return run(*args, **kwargs)
    except TypeError as error:
        if isinstance(error, ConvtapError) or _accepts(signature_of(model, method), args, kwargs):
            raise
        raise InvalidType(
            f"the model does not take this example: {one_line(error)}. Pass a tuple of positional arguments or a dict of "
            "keyword arguments, without labels: example=(x,). For batches, extract and top take inputs=."
        ) from error


def entry(model: nn.Module, method: Any) -> Callable[..., Any]:
    """Returns the function that runs a model: the model itself, or one of its methods.

    Raises:
        InvalidType: if ``method`` is not a str.
        InvalidValue: if the model does not have the method.
    """
    if method is None or method == "forward":
        return model
    if not isinstance(method, str):
        raise InvalidType(f"method is a {type(method).__name__}. Pass the name of a method: method='encode'.")
    found = getattr(model, method, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    kind = type(getattr(model, "_orig_mod", model))
    own = [
        name for name in dir(kind) if name not in dir(nn.Module) and name[0] != "_" and callable(getattr(kind, name))
    ]
    raise InvalidValue(
        f"method={method!r} is not a method of {kind.__name__}.{did_you_mean(method, own)} Its methods are: "
        f"{listed(['forward', *own])}."
    )


def forward_of(model: nn.Module, method: str | None) -> Callable[..., Any]:
    """Returns the function that receives the arguments: the forward, or a method."""
    run = entry(model, method)
    return model.forward if run is model else run


def signature_of(model: nn.Module, method: str | None = None) -> inspect.Signature | None:
    """Returns the signature of a model's forward or method, or None if it is unknown.

    Wrappers of the model are ignored.
    """
    try:
        return inspect.signature(forward_of(ModuleTree(model).names.get(ROOT, model), method))
    except (TypeError, ValueError, AttributeError):
        return None


def _accepts(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return signature is None or bool(signature.bind(*args, **kwargs))
    except TypeError:
        return False


def run_once(model: nn.Module, example: Any, mode: str | None = "eval") -> Any:
    """Returns a model's output for an example, without gradients.

    The model is run in the given mode and restored afterwards.
    """
    with looking(model, mode):
        return called(model, own_tensors(example))
