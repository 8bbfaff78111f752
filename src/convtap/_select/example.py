"""Turns examples and batches into arguments, and runs a model on them without leaving a trace."""

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

if TYPE_CHECKING:
    import numpy as np

# Note: [Examples and batches]
# An example is what the model is called with: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
# A batch is what data comes in. It is the same, but for a tuple or list, such as [x, labels] of a DataLoader: there the
# first element is the example. A function ``inputs`` says it where that is not so. In both, NumPy arrays of any depth stand
# for tensors: copies of them, on the model's device, those of floating numbers in the model's floating type.

#: A tensor or array, a tuple of positional arguments, or a mapping of keyword arguments.
Example: TypeAlias = "Tensor | np.ndarray[Any, Any] | tuple[Any, ...] | Mapping[str, Any]"


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits an example into what the model is called with. See Note: [Examples and batches].

    Raises:
        InvalidType: it is neither a tensor, an array, a tuple nor a mapping.
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
    """Whether a value is a NumPy array; without importing NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def prepared(example: Any, model: nn.Module) -> Any:
    """Returns an example with its arrays as tensors for a model; the example's own tensors stay as they are.

    Raises:
        InvalidType: it is neither a tensor, an array, a tuple nor a mapping; or an array has no form as a tensor.
    """
    arguments(example)
    found = with_tensors(example, model)
    if is_array(found):
        raise InvalidType(
            f"example is an array of {found.dtype}, and the model is called with numbers. Convert it first."
        )
    return dict(found) if isinstance(found, Mapping) else found


def fitted(example: Any, model: nn.Module) -> Any:
    """Returns an example for a model: its tensors too in the model's floating type, and on its device."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_leaves(fit, prepared(example, model), other=_unchanged)


def moved(value: Any, device: torch.device) -> Any:
    """Returns arguments with what can be moved on a device."""
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
    """Returns an example with tensors of its own, which the model may write into; one that is in it twice stays one."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return map_leaves(copied, example, other=_unchanged)


def with_tensors(value: Any, model: nn.Module) -> Any:
    """Returns a structure with its arrays as tensors; itself if it has none."""
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
    """Returns a tensor with the values of an array, which shares no memory with it; an array of text or objects as it is."""
    import numpy

    if array.dtype.kind not in "biufc":
        return array
    if isinstance(array, numpy.ma.MaskedArray) and array.mask.any():
        raise InvalidType(
            "the input has a masked array, and a tensor has no mask. Fill it first: array.filled(0.0), and pass the mask as "
            "the model takes it."
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
    """Puts a model into eval mode, and every module back into the mode it was in.

    Args:
        mode: ``"train"`` for train mode, None to leave each module's mode.
    """
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    try:
        if mode == "train" or (mode == "eval" and any(training for _, training in modes)):
            model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


@contextmanager
def looking(model: nn.Module, mode: str | None = "eval") -> Iterator[None]:
    """Runs the body with a model in a mode, without gradients, and leaves the model as it was.

    See Note: [Looking at a model].
    """
    other = mode == "train"
    training = [part for part in model.modules() if mode is not None and getattr(part, "training", other) != other]
    # A train or eval of the model's own may write into weights (low-rank adapters merge theirs), so all are copied.
    own = any(type(part).train is not nn.Module.train or type(part).eval is not nn.Module.eval for part in training)
    with untouched(model, everything=own), eval_mode(model, mode), torch.no_grad():
        yield


def called(model: nn.Module, example: Any, method: str | None = None) -> Any:
    """Calls a model, or a method of it, on an example.

    Raises:
        InvalidType: the model's forward, or the method, does not take such arguments.
        InvalidValue: the model has no such method.
    """
    args, kwargs = arguments(example)
    run = entry(model, method)
    try:
        return run(*args, **kwargs)
    except TypeError as error:
        if isinstance(error, ConvtapError) or _accepts(signature_of(model, method), args, kwargs):
            raise
        raise InvalidType(
            f"the model does not take this example: {one_line(error)}. Pass what it is called with, a tuple of positional "
            "or a dict of keyword arguments, without labels: example=(x,). (For batches, extract and top have inputs=.)"
        ) from error


def entry(model: nn.Module, method: Any) -> Callable[..., Any]:
    """Returns what is called to run a model: the model itself, or the method of that name.

    Raises:
        InvalidType: ``method`` is not a str.
        InvalidValue: the model has no such method.
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
        f"method={method!r} names no method of {kind.__name__}.{did_you_mean(method, own)} Its methods are: "
        f"{listed(['forward', *own])}."
    )


def forward_of(model: nn.Module, method: str | None) -> Callable[..., Any]:
    """Returns the function whose arguments a model is called with: its forward, or a method."""
    run = entry(model, method)
    return model.forward if run is model else run


def signature_of(model: nn.Module, method: str | None = None) -> inspect.Signature | None:
    """Returns the signature of a model's forward or method, inside its wrappers; None if it is not known."""
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
    """Returns a model's output for an example, in a mode and without gradients; leaves the model as it was."""
    with looking(model, mode):
        return called(model, own_tensors(example))
