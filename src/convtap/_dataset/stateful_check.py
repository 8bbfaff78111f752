"""Notices a model that keeps state from batch to batch, in a run that does not compute every batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convtap._errors import listed, warn_user
from convtap._select.module_tree import ModuleTree
from convtap._tensors.nested import walk_tensors

# Note: [State across batches]
# Assumption: a batch's rows depend on the batch and the model alone, so batches can be computed in any run and on any rank.
# Failure: a streaming model reads what the batch before has left in a buffer or an attribute; after a gap that is another
#   batch, or none, and the rows are those of no uninterrupted run.
# Choice: after a gap, look whether the first batches write into a tensor that was there before, or replace it by one of the
#   same shape. (A cache that is filled or grows is no state in this sense.) Then warn, by name.

_OTHERS = ("_parameters", "_buffers", "_modules")
_LOOKS = 2  # a model that keeps state changes it in every batch


class StateWatch:
    """Looks at a model around the batches after a gap, and warns once. See Note: [State across batches]."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._next = 0
        self._looks = 0
        self._before: dict[str, tuple[Tensor, int]] | None = None

    def before(self, number: int) -> None:
        """Is called before a batch is computed."""
        if number != self._next:
            self._looks = self._looks or _LOOKS
        self._next = number + 1
        self._before = _tensors(self._model) if self._looks > 0 else None

    def after(self) -> None:
        """Is called when it is computed."""
        before, self._before = self._before, None
        if before is None:
            return
        now = _tensors(self._model)
        changed = [name for name in before if name in now and _differs(*before[name], *now[name])]
        self._looks = -1 if changed or self._looks == 1 else self._looks - 1
        if changed:
            warn_user(
                f"the model keeps state from batch to batch ({listed(changed, 3)} changed in a batch), and this run does not "
                "compute every batch, so its rows may differ from those of one uninterrupted run. Extract such a model in one "
                "run and one process: give a new directory, without part=.",
            )


def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The buffers and plain tensor attributes of all modules, each with its version."""
    found: dict[str, tuple[Tensor, int]] = {}
    for name, module in ModuleTree(model).names.items():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            continue  # what it writes in train mode, it does not read there
        held: dict[str, Any] = {key: value for key, value in list(module.__dict__.items()) if key not in _OTHERS}
        for key, value in {**held, **module._buffers}.items():
            for path, tensor in walk_tensors(value):
                found[f"{name}.{key}{path}"] = (tensor, -1 if tensor.is_inference() else tensor._version)
    return found


def _differs(tensor: Tensor, version: int, now: Tensor, version_now: int) -> bool:
    if now is tensor:
        return version_now != version
    return now.shape == tensor.shape and now.dtype == tensor.dtype
