"""The function mode and the dispatch mode that follow a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

#: Runs a function or operation with its arguments and keyword arguments, and returns its result.
Run = Callable[[Any, Any, dict[str, Any]], Any]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes every low-level operation to a function, which runs it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True, the first operation imports torch's compiler, which takes over a second

    def __init__(self, run: Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._run(func, args, kwargs or {})

    def leave(self) -> None:
        """Ends the mode. It can be repeated, also after an interrupt."""
        while self in _get_current_dispatch_mode_stack():
            for name, flags in vars(self).items():
                if name.startswith("old_") and not flags:  # __exit__ was interrupted after it had taken its flags
                    flags.append(False)
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class Functions(TorchFunctionMode):
    """Passes every call of a torch function to a function, which runs it."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._run(func, args, kwargs or {})

    def leave(self) -> None:
        """Ends the mode. It can be repeated."""
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def is_composite(func: Any) -> bool:
    """Returns whether an operation is composed of others.

    It is then followed through these, if it does not have a rule of its own.
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def written(schema: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Returns the tensor that an operation writes to, or None."""
    for i, argument in enumerate(schema.arguments if schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor):
                return value
    return None


def is_view(schema: Any) -> bool:
    """Returns whether an operation returns a view of an argument."""
    return any(result.alias_info is not None for result in schema.returns)


def quantized_arguments(module: nnq.Conv1d, value: Tensor) -> tuple[Any, ...]:
    """Returns the arguments of the plain convolution that a quantized one represents.

    Its weight has a shape and no values.
    """
    weight = torch.empty(module.out_channels, 1, *module.kernel_size, device="meta")
    padding = (0,) if module.padding_mode != "zeros" else module.padding
    return (value, weight, None, module.stride, padding, module.dilation, False, (0,), 1)


def whole_slices(tensor: Tensor, index: Any) -> list[tuple[int, int]]:
    """Returns the axes that an index such as ``[..., :n]`` takes whole, with each n."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is ... or isinstance(part, slice) for part in parts):
        return []
    kept = next((i for i, part in enumerate(parts) if part is ...), len(parts))
    dims = [i if i < kept else tensor.dim() - len(parts) + i for i in range(len(parts))]
    return [
        (dim, part.stop)
        for dim, part in zip(dims, parts, strict=True)
        if isinstance(part, slice) and isinstance(part.stop, int) and part.stop >= tensor.shape[dim]
    ]
