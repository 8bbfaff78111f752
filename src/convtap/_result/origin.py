"""The origin of outputs: the model's class, mode and device, versions and date."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from convtap._select.module_tree import is_keras


def date_text(seconds: float) -> str:
    """Returns the UTC date and time, to the minute, of seconds since 1970."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def own_version() -> str:
    """Returns the version of convtap."""
    return str(sys.modules["convtap"].__version__)


def versions() -> str:
    """Returns the versions of convtap and torch."""
    return f"convtap {own_version()}, torch {torch.__version__}"


def class_name(model: nn.Module) -> str:
    """Returns the name of a model's class, or of a scripted model's Python class."""
    return str(model.original_name if isinstance(model, torch.jit.ScriptModule) else type(model).__name__)


@dataclass
class Origin:
    """The origin of outputs.

    Each attribute has one entry, unless captures were joined or passes differ.

    Attributes:
        models: the names of the models' classes.
        times: when the captures were opened, in seconds since 1970.
        versions: the versions of convtap and torch.
        modes: ``"train"`` or ``"eval"``, the mode of the model in the forward passes. Keras models have no such mode.
        devices: the devices of the first input tensors of the forward passes.
    """

    models: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """Returns the origin for a capture of a model that opens now."""
        return cls([class_name(model)], [time.time()], [versions()])

    @property
    def dates(self) -> list[str]:
        """The dates and the times at which the captures were opened."""
        return list(dict.fromkeys(map(date_text, self.times)))

    def joined(self, other: Origin) -> Origin:
        """Returns the origin of the joined outputs of two captures."""
        mine, others = vars(self), vars(other)
        return Origin(**{name: [*dict.fromkeys(mine[name] + others[name])] for name in mine})

    def note(self, model: nn.Module, given: Tensor | None) -> None:
        """Notes the mode and the device of a forward pass."""
        if not is_keras(type(model)):
            _add(self.modes, "train" if getattr(model, "training", False) else "eval")  # a frozen model has no mode
        if given is not None:
            _add(self.devices, str(given.device))

    def forget_passes(self) -> None:
        """Removes the modes and the devices."""
        self.modes.clear()
        self.devices.clear()


def _add(entries: list[str], entry: str) -> None:
    if entry not in entries:
        entries.append(entry)
