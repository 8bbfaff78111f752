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
    """A tensor that is kept without a copy, with its version at that time."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def read(self, key: str) -> Tensor:
        """Returns the tensor.

        Raises:
            ModifiedInPlace: if the tensor was written since it was kept.
        """
        changes = self.tensor._version - self.version
        if changes:
            raise ModifiedInPlace(
                f"{key!r} was kept as an alias, and the model has since changed it in place "
                f"({changes} {'time' if changes == 1 else 'times'}), so its original value is lost. "
                "Capture with copy=True and detach=True, the defaults, to keep the value."
            )
        return self.tensor

    def __reduce__(self) -> Any:  # a copy or pickle has no graph, and its tensor has a new version counter
        return _copied, (self.tensor.detach(), self.tensor._version - self.version)


def _copied(tensor: Tensor, changes: int) -> Alias:
    """Returns an alias of a tensor that was changed ``changes`` times since."""
    copy = Alias(tensor)
    copy.version -= changes
    return copy


def alias(tensor: Tensor) -> Any:
    """Keeps a tensor as an alias.

    A tensor of inference mode has no version counter, so it is kept as a snapshot.
    """
    return snapshot(tensor) if tensor.is_inference() else Alias(tensor)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The options that are applied to each output.

    Applying a policy changes neither the policy nor the model's tensor.

    Attributes:
        detach: whether to drop the autograd graph.
        copy: whether to keep a value that later in-place operations do not change.
        reduce: a function of the output, which is applied first, or a mapping from layers to such functions.
        dtype: the dtype of kept floating and complex tensors, applied after ``reduce``.
        keeps_fakes: whether FakeTensors, which have no values, are also kept.
    """

    detach: bool = True
    copy: bool = True
    reduce: Any = None
    dtype: torch.dtype | None = None

    keeps_fakes = False  # without an annotation, it is not a field

    @property
    def is_plain(self) -> bool:
        """Whether an output is only detached and snapshotted, which has a fast path."""
        return self.detach and self.copy and self.reduce is None and self.dtype is None

    @property
    def transforms(self) -> bool:
        """Whether the kept value is computed from the output."""
        return self.reduce is not None or self.dtype is not None

    def keep_input(self, tensor: Tensor) -> Any:
        """Keeps a tensor that the layer did not make, as a real copy or an alias.

        Other code may own its memory, so a copy-on-write snapshot is not safe.
        """
        if self.transforms:
            tensor = tensor.detach() if self.detach else tensor
            return self._transform(tensor.clone() if self.copy else tensor)
        if self.detach:
            tensor = tensor.detach()
            return tensor.clone() if self.copy else alias(tensor)
        return alias(tensor)

    def keep_output(self, tensor: Tensor, fresh: bool = True) -> Any:
        """Keeps an output while the model continues with it.

        Args:
            tensor: the output.
            fresh: whether the layer allocated the output's memory. The memory of an input, a parameter or a buffer may be
                written without torch's knowledge, so an output in such memory is cloned.
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
        """Keeps a tensor before it is copied to another device.

        The result is never an alias, even with ``copy=False``, since a later kernel could write to it during the copy.
        """
        if self.transforms:
            return keep(tensor)
        tensor = tensor.detach() if self.detach else tensor
        return tensor.clone() if keep == self.keep_input else snapshot(tensor)

    def swaps(self, output: Leaves, inputs: Any) -> bool:
        """Returns whether the output itself is kept, and the model gets a snapshot.

        The kept output is then upstream of the loss. Three kinds of output are not swapped: an output that shares memory with
        an input or within itself, a structure whose copy may differ from it, and an output that is being traced.
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
                f"reduce returned a {type(result).__name__}, which is not a tensor. "
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
                        f"reduce has the entry {key!r}: {type(function).__name__}, but it must map names of layers, or globs, "
                        "to functions of a tensor. Write for example reduce={'conv1': lambda t: t.mean(-1)}."
                    )
        elif self.reduce is not None and not callable(self.reduce):
            raise InvalidType(
                f"reduce is a {type(self.reduce).__name__}, which is not a function. "
                "Write for example reduce=lambda t: t.mean(-1)."
            )
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InvalidType(f"dtype={self.dtype!r} is not a torch.dtype. Write for example dtype=torch.float16.")


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts a floating or complex tensor as every ``dtype=`` option does.

    Other tensors (integer, boolean, quantized) are returned unchanged. If ``dtype`` is None, every tensor is.

    Raises:
        InvalidValue: if the cast would drop an imaginary part.
    """
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if drops_imaginary_part(tensor, dtype):
        _refuse_cast(tensor.dtype, dtype)
    return tensor.to(dtype)


def drops_imaginary_part(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Returns whether a cast to ``dtype`` would drop a tensor's imaginary part."""
    return dtype is not None and tensor.is_complex() and not dtype.is_complex


def _refuse_cast(kind: torch.dtype, dtype: torch.dtype) -> None:
    raise InvalidValue(
        f"dtype={dtype} would drop the imaginary part of a {kind} tensor. Pass a complex dtype, or make the output real "
        "first: reduce=lambda t: t.abs()."
    )


# Dynamo calls this function while it traces, so the user of a compiled tapped model sees its message.
_refuse_cast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_traced() -> bool:
    """Returns whether TorchScript or an exporter is tracing.

    A replacement output would then become part of the graph.
    """
    return tracing_state() is not None or torch.compiler.is_compiling()


def is_plain_structure(value: Any) -> bool:
    """Returns whether a copy of a structure equals it.

    That is the case if it consists of plain tuples, lists, dicts and dataclasses.
    """
    if type(value) in (tuple, list):
        return all(is_plain_structure(item) for item in value)
    if type(value) is dict:
        return all(is_plain_structure(item) for item in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, dict):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return vars(value).keys() == fields.keys() and all(is_plain_structure(item) for item in fields.values())
    return not isinstance(value, (tuple, list, dict))
