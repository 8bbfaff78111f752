"""Small models, each named for its peculiarity."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FiveConvs(nn.Module):
    """The network of the question that convtap began with: five convolutions, each followed by an activation."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        sizes = [1, 4, 4, 8, 8, 8]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 5, padding=2) for a, b in pairwise(sizes))
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.act(conv(x))
        return x


class AfterConv(nn.Module):
    """One convolution, then an operation given as a function of its output."""

    def __init__(self, then, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, channels, 3, padding=1)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.conv(x))


class ReusedConv(nn.Module):
    """One module that runs three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.last = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu_(self.conv(x))
        return self.last(x)


class SharedConv(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 3, 3, padding=1)
        self.second = nn.Sequential(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class RaisesHalfway(nn.Module):
    """Raises between its two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 2, 3)
        self.b = nn.Conv1d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        raise RuntimeError("halfway")


class CatchesItsLayersError(nn.Module):
    """Feeds a layer an input of the wrong width, catches the error, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 2, 3, padding=1)
        self.b = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        try:
            self.b(x)
        except RuntimeError:
            y = y * 2
        return self.b(y) + F.conv1d(y, self.a.weight.expand(2, 2, 3), padding=1)


class BranchOnData(nn.Module):
    """Runs one of two convolutions, depending on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv1d(1, 2, 3)
        self.high = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(x) if x.mean() > 0 else self.low(x)


@dataclass
class Pair:
    """A dataclass output."""

    hidden: Tensor
    mask: Tensor | None


class StructuredOutputs(nn.Module):
    """Three layers that return a tuple, a dict and a dataclass."""

    class Tuple(nn.Conv1d):
        def forward(self, x):
            y = super().forward(x)
            return y, (y * 2, None)

    class Dict(nn.Conv1d):
        def forward(self, x):
            return {"y": super().forward(x), "n": 3}

    class Data(nn.Conv1d):
        def forward(self, x):
            return Pair(super().forward(x), None)

    def __init__(self) -> None:
        super().__init__()
        self.t = self.Tuple(1, 2, 3, padding=1)
        self.d = self.Dict(2, 2, 3, padding=1)
        self.p = self.Data(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.t(x)
        y = self.d(y.relu_())["y"]
        return self.p(y.relu_()).hidden.relu_()


class KeywordOnly(nn.Module):
    """Takes its input by keyword, and calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, *, signal: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(input=signal) * scale


class Images(nn.Module):
    """Has no Conv1d at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TwoParts(nn.Module):
    """An encoder and a decoder that people also call by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.Tanh())
        self.decoder = nn.Sequential(nn.Conv1d(3, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class FunctionalConvs(nn.Module):
    """Convolutions without a module: loose parameters, a list of them, a Linear's weight, a layer's weight, a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.kernels = nn.ParameterList([torch.randn(4, 4, 3), torch.randn(4, 4, 1)])
        self.linear = nn.Linear(4, 5)
        self.conv = nn.Conv1d(5, 5, 3, padding=1, groups=5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv1d(x, self.kernel, padding=1), inplace=True)
        for kernel in self.kernels:
            x = F.relu_(F.conv1d(x, kernel, padding="same"))
        x = F.conv1d(x, self.linear.weight.unsqueeze(-1), self.linear.bias).relu_()
        x = F.conv1d(x, self.conv.weight, self.conv.bias, padding=1, groups=5).relu_()
        return torch.conv1d(x, torch.ones(2, 5, 1, dtype=x.dtype)).relu_()


class PaddedConv(nn.Conv1d):
    """A subclass that pads and calls ``super().forward``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class FusedKernel(torch.autograd.Function):
    """Stands in for a fused kernel: computes a depthwise convolution without any convolution call."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        width = weight.shape[-1]
        padded = F.pad(x, (width - 1, 0))
        return sum(padded[..., i : i + x.shape[-1]] * weight[:, i : i + 1] for i in range(width))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class UsesFusedKernel(nn.Module):
    """Gives its convolution's weight to a fused kernel, as Mamba does on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, 4, 1)
        self.conv = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return FusedKernel.apply(self.inp(x), self.conv.weight.squeeze(1))
