"""Applies the options to one output: reduce, cast, detach, snapshot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, ModifiedInPlace
from convtap._tensors.memory import are_separate
from convtap._tensors.nested import Held, Leaves, walk_tensors
from convtap._tensors.snapshot import own, snapshot
from convtap._torch.modes import tracing_state


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
                "Capture with copy=True and detach=True, the defaults, to keep the value."
            )
        return self.tensor

    def __reduce__(self) -> Any:  # a copy, or a pickle, has no graph; its tensor counts its own versions
        return _copied, (self.tensor.detach(), self.tensor._version - self.version)


def _copied(tensor: Tensor, changes: int) -> Alias:
    """Returns an alias of a tensor that was changed so often since it was kept."""
    copy = Alias(tensor)
    copy.version -= changes
    return copy


def alias(tensor: Tensor) -> Any:
    """Keeps a tensor as an alias; one without a version counter (inference mode) as a snapshot instead."""
    return snapshot(tensor) if tensor.is_inference() else Alias(tensor)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to do with each output. Pure: applying it changes neither the policy nor the model's tensor.

    Attributes:
        detach: keep no autograd graph.
        copy: keep a value that later in-place operations do not change.
        reduce: a function of the output, applied first; or a mapping from layers to functions, of which the recording takes
            that of the layer.
        dtype: what to cast floating and complex tensors to, after ``reduce``.
        keeps_fakes: whether FakeTensors are kept as well, which have no values.
    """

    detach: bool = True
    copy: bool = True
    reduce: Any = None
    dtype: torch.dtype | None = None

    keeps_fakes = False  # no annotation: not a field

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

    def keep_output(self, tensor: Tensor, fresh: bool = True) -> Any:
        """Keeps an output that the model goes on with.

        Args:
            tensor: the output.
            fresh: whether its memory is the layer's own. Memory that may be a view of an input, a parameter or a buffer
                may also be written past torch, so such an output is cloned.
        """
        if self.copy and not fresh:
            return (
                self.keep_input(tensor) if self.detach or self.transforms or not tensor.requires_grad else alias(tensor)
            )
        if self.transforms:
            return self._transform(snapshot(tensor.detach() if self.detach else tensor))
        if tensor.requires_grad:
            if not self.detach:
                return alias(tensor)
            tensor = tensor.detach()
        return snapshot(tensor) if self.copy else alias(tensor)

    def keep_moving(self, tensor: Tensor, keep: Callable[[Tensor], Any]) -> Any:
        """Keeps what is about to be copied to another device, with its graph if it has one.

        Never an alias, whatever ``copy`` says: a later kernel could write into it under the copy.
        """
        if self.transforms:
            return keep(tensor)
        tensor = tensor.detach() if self.detach else tensor
        return tensor.clone() if keep == self.keep_input else snapshot(tensor)

    def swaps(self, output: Leaves, inputs: Any) -> bool:
        """Whether the output itself is kept, upstream of the loss, and the model goes on with a snapshot of it.

        Not where that would part tensors that share memory: an output and an input, or two tensors of one output; nor
        where the output is a structure of a type that a copy may not equal; nor while it is traced.
        """
        if self.detach or not self.copy or self.transforms or _is_traced() or not is_plain_structure(output.structure):
            return False
        tensors = output.tensors
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
        result = cast(result, self.dtype)
        if self.detach and result.requires_grad:
            result = result.detach()
        return own(result)

    def __post_init__(self) -> None:
        if isinstance(self.reduce, Mapping):
            for key, function in self.reduce.items():
                if not isinstance(key, str) or not callable(function):
                    raise InvalidType(
                        f"reduce has the entry {key!r}: {type(function).__name__}, and a mapping must have names of layers, "
                        "or globs, for functions of a tensor. Write for example reduce={'conv1': lambda t: t.mean(-1)}."
                    )
        elif self.reduce is not None and not callable(self.reduce):
            raise InvalidType(
                f"reduce is a {type(self.reduce).__name__}, and it must be a function of a tensor: "
                "reduce=lambda t: t.mean(-1)."
            )
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InvalidType(f"dtype is {self.dtype!r}, and it must be a torch.dtype such as torch.float16.")


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts a floating or complex tensor to ``dtype``: the rule of every ``dtype=`` option.

    Other tensors (integers, booleans, quantized ones) are returned as they are, and so is any tensor if ``dtype`` is None.

    Raises:
        InvalidValue: the cast would drop an imaginary part.
    """
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if drops_imaginary_part(tensor, dtype):
        _refuse_cast(tensor.dtype, dtype)
    return tensor.to(dtype)


def drops_imaginary_part(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Says whether a cast to ``dtype`` would drop the imaginary part of a tensor."""
    return dtype is not None and tensor.is_complex() and not dtype.is_complex


def _refuse_cast(kind: torch.dtype, dtype: torch.dtype) -> None:
    raise InvalidValue(
        f"dtype={dtype} would drop the imaginary part of a {kind} tensor. Cast to a complex type, or take a part first: "
        "reduce=lambda t: t.abs()."
    )


# Dynamo runs this while it traces, so that its message is what a user of a compiled tapped model sees.
_refuse_cast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_traced() -> bool:
    """Whether TorchScript or an exporter is tracing: what is returned to the model would become part of the graph."""
    return tracing_state() is not None or torch.compiler.is_compiling()


def is_plain_structure(value: Any) -> bool:
    """Whether a structure consists of tuples, lists, dicts and dataclasses that are nothing more: a copy equals it."""
    if type(value) in (tuple, list):
        return all(is_plain_structure(item) for item in value)
    if type(value) is dict:
        return all(is_plain_structure(item) for item in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, dict):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return vars(value).keys() == fields.keys() and all(is_plain_structure(item) for item in fields.values())
    return not isinstance(value, (tuple, list, dict))
