"""The tasks of the comparison: models, inputs, layers and reference outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks import overhead
from benchmarks.compiled import convolutions
from benchmarks.harness import declare_torchvision_operators

#: The capturing name of each library.
IMPORTS = {
    "convtap": "convtap.capture",
    "torchvision": "torchvision.models.feature_extraction.create_feature_extractor",
    "torchlens": "torchlens.record",
    "nnsight": "nnsight.NNsight",
    "captum": "captum.attr.LayerActivation",
    "torchextractor": "torchextractor.Extractor",
    "surgeon": "surgeon_pytorch.Inspect",
}
#: The rows for which watching functions makes a difference.
WITHOUT_FUNCTIONS = ("stack-steady", "stack-entered", "wav2vec2", "mamba")


@dataclass(frozen=True)
class Work:
    """A task of the comparison.

    Attributes:
        model: the model, in eval mode.
        x: its input.
        names: the layers to capture, in the order in which they run.
        expected: the output of each layer.
    """

    model: nn.Module
    x: Tensor
    names: Sequence[str]
    expected: dict[str, Tensor]

    def plain(self) -> Any:
        """Runs the forward pass alone."""
        return self.model(self.x)


class _Reference(TorchFunctionMode):
    """Clones the output of every ``F.conv1d`` in order, whatever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.conv1d, torch.conv1d):
            self.found.append(result.detach().clone())
        return result


def reference(work: Work, x: Tensor) -> dict[str, Tensor]:
    """Returns the layers' outputs for another input."""
    with _Reference() as mode:
        work.model(x)
    return dict(zip(work.names, mode.found, strict=False))


def copied(work: Work) -> Work:
    """Returns the same task with a copy of the model."""
    return replace(work, model=copy.deepcopy(work.model))


def _work(model: nn.Module, x: Tensor, names: Sequence[str] | None = None) -> Work:
    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    work = Work(model.eval(), x, names, {})
    return replace(work, expected=reference(work, x))


def stack() -> Work:
    """64 × Conv1d(8, 8, 3) on (1, 8, 64), which show the overhead."""
    model, _ = overhead.micro_stack()
    return _work(model, torch.randn(1, 8, 64))


def wav2vec2() -> Work:
    """The seven convolutions of wav2vec2-base's encoder, on one second of audio."""
    model, _ = overhead.wav2vec2_base()
    names = [f"feature_extractor.conv_layers.{i}.conv" for i in range(7)]
    return _work(model, torch.randn(1, 16000), names)


def mamba() -> Work:
    """A Mamba of eight layers, whose convolutions are functions of modules' weights."""
    declare_torchvision_operators()
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(vocab_size=100, hidden_size=128, num_hidden_layers=8, state_size=8)
    names = [f"layers.{i}.mixer.conv1d" for i in range(8)]
    return _work(MambaModel(config), torch.randint(0, 100, (1, 64)), names)


def twenty() -> Work:
    """20 × Conv1d(64, 64, 3) on (4, 64, 2000), of which the first three are captured."""
    model = nn.Sequential(*(nn.Conv1d(64, 64, 3, padding=1) for _ in range(20)))
    return _work(model, torch.randn(4, 64, 2000), ["0", "1", "2"])


def residual() -> Work:
    """16 residual blocks of Conv1d(64, 64, 3) and in-place ReLU, on (4, 64, 2000)."""
    return _work(convolutions(16, 64), torch.randn(4, 64, 2000))


def inplace() -> Work:
    """32 × Conv1d(64, 64, 3) and in-place ReLU, with outputs of 156 MiB."""
    layers = [layer for _ in range(32) for layer in (nn.Conv1d(64, 64, 3, padding=1), nn.ReLU(inplace=True))]
    return _work(nn.Sequential(*layers), torch.randn(1, 64, 20000))


def five() -> Work:
    """Five Conv1d(64, 64, 3) and ReLU on (B, 4, 1000): 1.28 MB of outputs a sample."""
    layers: list[nn.Module] = []
    for i in range(5):
        layers += [nn.Conv1d(64 if i else 4, 64, 3, padding=1), nn.ReLU()]
    return _work(nn.Sequential(*layers), torch.randn(32, 4, 1000))
