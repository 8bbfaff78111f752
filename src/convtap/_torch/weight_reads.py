"""Notices when code outside of a layer, such as a fused kernel, reads its weight."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import nn

from convtap._torch.call_stack import FORWARD_OF_CONV1D
from convtap._torch.lock import Lock
from convtap._torch.weight_marks import Reader, follow, release

# Note: [What reads a weight]
# Assumption: code that computes a convolution by itself first fetches ``conv.weight``, which looks in the layer's
#   ``_parameters``. It then passes the weight to a torch call (squeeze, to, T, data_ptr, …), which consults a subclass of
#   Parameter.
# Failure: watching every torch call would slow down calls that have nothing to do with a convolution. Harmless code also
#   fetches weights: it reads their shapes, or initializes or renormalizes them in place.
# Choice: while a capture is open, a selected layer's ``_parameters`` is a dict that notes each fetch outside of the layer's
#   own forward. The fetched weight has another class until the pass ends. That class sees the calls on the weight, and on
#   the tensors that were computed from it.

_frame = sys._getframe
_get = dict.__getitem__
_lock = Lock()


class _Watched(dict):  # type: ignore[type-arg]
    """The parameters of one watched layer. See Note: [What reads a weight]."""

    __slots__ = ("is_changed", "original", "readers")

    original: dict[str, Any]
    readers: tuple[tuple[Reader, str], ...]
    is_changed: bool

    def __getitem__(self, key: str) -> Any:
        try:
            if _frame(2).f_code is FORWARD_OF_CONV1D:  # by way of Module.__getattr__
                return _get(self, key)
        except ValueError:  # the stack has fewer frames
            pass
        _fetched(self, key, _frame(1))
        return _get(self, key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def _noting_change(name: str) -> Any:
    method = getattr(dict, name)

    def change(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        self.is_changed = True
        return method(self, *args, **kwargs)

    return change


for _name in ("__setitem__", "__delitem__", "__ior__", "update", "setdefault", "pop", "popitem", "clear"):
    setattr(_Watched, _name, _noting_change(_name))


class WeightReads:
    """Watches the weights of one capture's layers."""

    def __init__(self) -> None:
        self._reader: Reader | None = None
        self._modules: list[nn.Module] = []

    def open(self, reader: Reader, layers: Iterable[tuple[str, nn.Module]]) -> None:
        """Begins to watch the parameters of layers, given as (name, module)."""
        self._reader = reader
        with _lock:
            for name, module in layers:
                self._modules.append(module)
                watched = module.__dict__["_parameters"]
                if type(watched) is _Watched:
                    watched.readers = (*watched.readers, (reader, name))
                    continue
                original, watched = watched, _Watched(watched)
                watched.original, watched.readers, watched.is_changed = original, ((reader, name),), False
                module.__dict__["_parameters"] = watched

    def close(self) -> None:
        """Ends the watch. A second call does nothing. See Note: [Interrupts]."""
        self.release()
        self.pause()
        self._reader = None  # breaks a reference cycle

    def pause(self) -> None:
        """Pauses the watch. Weights that were already fetched are still followed."""
        reader = self._reader
        with _lock:
            for module in self._modules:
                watched = module.__dict__["_parameters"]
                if type(watched) is _Watched:
                    if len(watched.readers) > 1:
                        watched.readers = tuple(pair for pair in watched.readers if pair[0] is not reader)
                    if not watched.readers or watched.readers[0][0] is reader:
                        if watched.is_changed:
                            watched.original.clear()
                            watched.original.update(watched)
                        module.__dict__["_parameters"] = watched.original
                        watched.readers = ()  # a shallow copy of the layer may also have this dict
        self._modules.clear()

    def release(self) -> None:
        """Stops following fetched weights, at the end of a pass or of the capture."""
        release(self._reader)


def _fetched(watched: _Watched, key: str, reader: FrameType | None) -> None:
    while reader is not None and reader.f_code is _GETATTR:
        reader = reader.f_back
    if reader is None or reader.f_code is FORWARD_OF_CONV1D or _is_a_copy(reader):
        return
    if not key.startswith(("weight", "original")):  # a bias is not a convolution's weight
        return
    value = _get(watched, key)
    for who, name in watched.readers:
        if who.may_read(name):
            follow(value, [(who, name)], (reader.f_code, reader.f_lasti))


_GETATTR = nn.Module.__getattr__.__code__


def _is_a_copy(reader: FrameType) -> bool:
    """Returns whether a fetch is part of copying a layer or swapping its parameters."""
    return reader.f_globals.get("__name__") in ("copy", "torch.nn.utils._named_member_accessor")
