"""Where outputs come from: the model's class, its mode, its device, the versions and the date."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from convtap._select.module_tree import is_keras


def now() -> str:
    """Returns the date and the time in UTC, to the minute."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def own_version() -> str:
    """Returns the version of convtap."""
    return str(sys.modules["convtap"].__version__)


def versions() -> str:
    """Returns the versions of convtap and torch that run."""
    return f"convtap {own_version()}, torch {torch.__version__}"


def class_name(model: nn.Module) -> str:
    """Returns the name of a model's class; of a scripted model, of the class that it was made from."""
    return str(getattr(model, "original_name", None) or type(model).__name__)


@dataclass
class Origin:
    """Where outputs come from. Each attribute has one entry, unless captures were joined or passes differ.

    Attributes:
        models: the names of the models' classes.
        dates: when the captures were opened.
        versions: of convtap and torch.
        modes: ``"train"`` or ``"eval"``, of the whole model in the forward passes; none for Keras, which has no such mode.
        devices: those of the first input tensor of the forward passes.
    """

    models: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """Returns the origin of what a capture of a model collects from now on."""
        return cls([class_name(model)], [now()], [versions()])

    def joined(self, other: Origin) -> Origin:
        """Returns the origin of the outputs of two captures."""
        mine, others = vars(self), vars(other)
        return Origin(**{name: [*dict.fromkeys(mine[name] + others[name])] for name in mine})

    def note(self, model: nn.Module, given: Tensor | None) -> None:
        """Notes the mode and the device of a forward pass."""
        if not is_keras(type(model)):
            _add(self.modes, "train" if model.training else "eval")
        if given is not None:
            _add(self.devices, str(given.device))

    def forget_passes(self) -> None:
        """Forgets what ``note`` noted."""
        self.modes.clear()
        self.devices.clear()


def _add(entries: list[str], entry: str) -> None:
    if entry not in entries:
        entries.append(entry)
