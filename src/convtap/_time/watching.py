"""The two modes through which a pass is followed, and what some calls in it stand for."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Follows(Protocol):
    """What is told of each call."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Takes a call of a torch function, and runs it."""

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes a low-level operation, and runs it."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every low-level operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True, the first operation imports torch's compiler, which takes over a second

    def __init__(self, follower: Follows) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._follower = follower

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._follower.operation(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Tells of every call of a torch function."""

    def __init__(self, follower: Follows) -> None:
        super().__init__()
        self._follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._follower.call(func, args, kwargs or {})


def quantized_arguments(module: nnq.Conv1d, value: Tensor) -> tuple[Any, ...]:
    """Returns the arguments of the plain convolution that a quantized one stands for; of the weight only the shape."""
    weight = torch.empty(module.out_channels, 1, *module.kernel_size, device="meta")
    padding = (0,) if module.padding_mode != "zeros" else module.padding
    return (value, weight, None, module.stride, padding, module.dilation, False, (0,), 1)


def whole_slices(tensor: Tensor, index: Any) -> list[tuple[int, int]]:
    """Returns the axes that an index such as ``[..., :n]`` takes all of, n being all there is or more; with each its n."""
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
