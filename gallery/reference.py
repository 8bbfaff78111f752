"""Finds a plain run's convolutions, and computes their values independently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: The operators of 1-D convolutions: the first one with autograd, the others in inference mode.
NUMBERS = ("aten::convolution", "aten::conv1d", "aten::conv1d.padding")


@dataclass
class Convolution:
    """The arguments and the output of one convolution."""

    input: Tensor  # (B, C, T)
    weight: Tensor  # (O, C / groups, K)
    bias: Tensor | None
    stride: int
    padding: tuple[int, int]
    dilation: int
    groups: int
    output: Tensor

    def by_hand(self) -> Tensor:
        """Computes the output (B, O, T) in float64, as products of windows and kernels."""
        x, weight = F.pad(self.input.double(), self.padding), self.weight.double()
        span = self.dilation * (weight.shape[-1] - 1) + 1
        windows = x.unfold(-1, span, self.stride)[..., :: self.dilation]  # (B, C, T, K)
        windows = windows.unflatten(1, (self.groups, -1))
        y = torch.einsum("bgctk,gock->bgot", windows, weight.unflatten(0, (self.groups, -1))).flatten(1, 2)
        return y if self.bias is None else y + self.bias.double()[:, None]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Convolution] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name()
        if name not in NUMBERS or args[0].dim() != 3:
            return output
        given = {argument.name: argument.default_value for argument in func._schema.arguments} | (kwargs or {})
        given |= dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
        if not given.get("transposed", False):
            self.found.append(_convolution(given, output))
        return output


def _convolution(given: dict[str, Any], output: Tensor) -> Convolution:
    stride, dilation = given["stride"][0], given["dilation"][0]
    padding = given["padding"]
    if padding == "same":
        total = dilation * (given["weight"].shape[-1] - 1)
        sides = (total // 2, total - total // 2)
    else:
        sides = (0, 0) if padding == "valid" else (padding[0], padding[0])
    read = [None if given[name] is None else given[name].detach().clone() for name in ("input", "weight", "bias")]
    return Convolution(*read, stride, sides, dilation, given["groups"], output.detach().clone())


def convolutions(run: Callable[[], object]) -> list[Convolution]:
    """Returns all 1-D convolutions of a run, of Python, TorchScript and Keras."""
    with _Recorder() as recorder:
        run()
    return recorder.found
