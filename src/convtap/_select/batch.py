"""Turns a batch of data into the model's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from convtap._errors import ConvtapError, InvalidType, Unsupported, one_line
from convtap._select.example import forward_of, is_array, signature_of, with_tensors

#: Turns a batch into ``(args, kwargs)``.
Inputs: TypeAlias = "Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]"


def called_with(inputs: Inputs | None, batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the model's arguments for a batch, from ``inputs`` or by default.

    See Note: [Examples and batches].

    Raises:
        InvalidType: if ``inputs`` does not return ``(args, kwargs)``, or a batch of this type has no default.
    """
    if inputs is None:
        return with_tensors(_default(batch), model)  # type: ignore[no-any-return]
    found = inputs(batch)
    if (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], (tuple, list))
        and isinstance(found[1], Mapping)
    ):
        return with_tensors((tuple(found[0]), dict(found[1])), model)  # type: ignore[no-any-return]
    raise InvalidType(
        f"inputs(batch) returned a {type(found).__name__}, which is not (args, kwargs). Write for example "
        "inputs=lambda batch: ((batch['audio'],), {'mask': batch['mask']})."
    )


def _default(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, (tuple, list)) and batch and not isinstance(batch, PackedSequence):
        return _default(batch[0])
    if isinstance(batch, (Tensor, PackedSequence)) or is_array(batch):
        return (batch,), {}
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return (), dict(batch)
    raise InvalidType(
        f"a batch is a {type(batch).__name__}, not a tensor, a dict of keyword arguments, or a tuple that begins with one of "
        "these. Pass a function that returns the model's arguments: inputs=lambda batch: ((batch.x,), {})."
    )


def as_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], method: str | None = None) -> Any:
    """Returns a call's arguments as an example: a tuple or a dict.

    A call with both kinds of arguments becomes a dict with the parameter names of the forward.

    Args:
        model: the model.
        args: the positional arguments.
        kwargs: the keyword arguments.
        method: the method that is called instead of the model itself, or None.

    Raises:
        Unsupported: if the forward does not have names for the positional arguments.
    """
    if not kwargs:
        return args
    if not args:
        return kwargs
    try:
        bound = inspect.signature(forward_of(model, method)).bind(*args, **kwargs)
        return {**bound.arguments, **bound.arguments.pop("kwargs", {})}
    except (TypeError, ValueError) as error:
        raise Unsupported(
            f"the inputs have positional and keyword arguments, and here they must be of one kind: {error}. Return all of them "
            "by keyword: inputs=lambda batch: ((), {'x': batch['audio']})."
        ) from error


@contextmanager
def naming_inputs(inputs: Inputs | None, batch: Any, model: nn.Module, method: str | None = None) -> Iterator[None]:
    """A context for a call of the model on a batch, which explains a failed call.

    If the batch was passed by default, the error recommends ``inputs``.

    Raises:
        InvalidType: if the model rejected the arguments.
    """
    try:
        yield
    except Exception as error:
        if inputs is not None:
            raise
        advice = f"Pass a function from a batch to (args, kwargs): inputs={_code(batch, signature_of(model, method))}."
        refused = error.__cause__ if isinstance(error, InvalidType) else error
        if isinstance(refused, TypeError) and not isinstance(refused, ConvtapError):
            raise InvalidType(f"the model rejected {_passed(batch)}: {one_line(refused)}. {advice}") from refused
        if not isinstance(error, ConvtapError) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"convtap passed {_passed(batch)} to the model, which may need other arguments. {advice}")
        raise


def _passed(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"the batch's items as keyword arguments ({', '.join(map(str, batch))})"
    if isinstance(batch, (tuple, list)):
        return f"the first of the {len(batch)} elements of the batch"
    return f"the batch, a {type(batch).__name__}"


def _code(batch: Any, signature: inspect.Signature | None) -> str:
    """Returns the code of an ``inputs`` function for a batch and a model's signature."""
    if isinstance(batch, Mapping) and batch:
        taken = [] if signature is None else [key for key in batch if key in signature.parameters]
        if taken:
            return "lambda batch: ((), {" + ", ".join(f"{key!r}: batch[{key!r}]" for key in taken) + "})"
        key = next(
            (key for key, value in batch.items() if isinstance(value, Tensor) or is_array(value)), next(iter(batch))
        )
        return f"lambda batch: ((batch[{key!r}],), {{}})"
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return "lambda batch: (tuple(batch), {})" if _needs(signature) > 1 else "lambda batch: ((batch[1],), {})"
    return "lambda batch: ((batch,), {})"


def _needs(signature: inspect.Signature | None) -> int:
    """Counts the positional arguments that a model requires."""
    found = [] if signature is None else signature.parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(1 for one in found if one.kind in kinds and one.default is one.empty)
