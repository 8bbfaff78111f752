"""Warns if a model keeps state across batches in a run that skips batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convtap._errors import listed, warn_user
from convtap._select.module_tree import ModuleTree
from convtap._tensors.nested import walk_tensors

# Note: [State across batches]
# Assumption: a batch's rows depend only on the batch and the model, so batches can be computed in any run and on any rank.
# Failure: a streaming model reads a buffer or an attribute that the previous batch has written. After a gap that was another
#   batch, or none, so the rows differ from those of an uninterrupted run.
# Choice: after a gap, check whether the first batches write into an existing tensor, or replace it by one of the same shape.
#   (A cache that is filled or grows does not count as state.) Then warn, by name.

_OTHERS = ("_parameters", "_buffers", "_modules")
_LOOKS = 2  # a model that keeps state changes it in every batch


class StateWatch:
    """Checks a model's state around the batches after a gap, and warns once.

    See Note: [State across batches].
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._next = 0
        self._looks = 0
        self._before: dict[str, tuple[Tensor, int]] | None = None

    def before(self, number: int) -> None:
        """Notes the state; called before a batch is computed."""
        if number != self._next:
            self._looks = self._looks or _LOOKS
        self._next = number + 1
        self._before = _tensors(self._model) if self._looks > 0 else None

    def after(self) -> None:
        """Compares the state; called after a batch is computed."""
        before, self._before = self._before, None
        if before is None:
            return
        now = _tensors(self._model)
        changed = [name for name in before if name in now and _differs(*before[name], *now[name])]
        self._looks = -1 if changed or self._looks == 1 else self._looks - 1
        if changed:
            warn_user(
                f"the model keeps state from batch to batch ({listed(changed, 3)} changed in a batch), but this run does not "
                "compute every batch, so its rows may differ from those of an uninterrupted run. Extract such a model in one "
                "run and one process: pass a new directory, and remove part=.",
            )


def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Returns the buffers and tensor attributes of all modules, with their versions."""
    found: dict[str, tuple[Tensor, int]] = {}
    for name, module in ModuleTree(model).names.items():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            continue  # it does not read its running statistics in train mode, in which it writes them
        held: dict[str, Any] = {key: value for key, value in list(module.__dict__.items()) if key not in _OTHERS}
        for key, value in {**held, **module._buffers}.items():
            for path, tensor in walk_tensors(value):
                found[f"{name}.{key}{path}"] = (tensor, -1 if tensor.is_inference() else tensor._version)
    return found


def _differs(tensor: Tensor, version: int, now: Tensor, version_now: int) -> bool:
    if now is tensor:
        return version_now != version
    return now.shape == tensor.shape and now.dtype == tensor.dtype
