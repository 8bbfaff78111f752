"""Moves kept tensors to another device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue

_REMEDY = "Write offload='cpu', or another device that this machine has."


class Offloader:
    """Moves tensors to one device.

    Raises:
        InvalidType: ``device`` is no device.
        InvalidValue: it names a device that cannot hold values, or that this machine does not have.
    """

    def __init__(self, device: Any) -> None:
        self.device = _checked(device)

    def move(self, tensor: Tensor) -> Tensor:
        """Returns the tensor on the device (itself, if it is there already)."""
        return tensor.to(self.device)


def _checked(device: Any) -> torch.device:
    if not isinstance(device, (str, torch.device, int)) or isinstance(device, bool):
        raise InvalidType(f"offload is a {type(device).__name__}, and it must be a device. {_REMEDY}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InvalidValue(f"offload={device!r} is no device. {_REMEDY}") from None
    if found.type == "meta":
        raise InvalidValue(f"offload='meta' would throw every value away: a meta tensor has none. {_REMEDY}")
    if found.type != "cpu":
        try:
            torch.empty(0, device=found)
        except Exception as error:
            raise InvalidValue(f"offload={str(found)!r} cannot be used here: {_first_line(error)} {_REMEDY}") from error
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}."
