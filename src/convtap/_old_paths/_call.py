"""Loads ``Call`` and the record of a layer from pickles of version 0.1.0."""

from __future__ import annotations

from typing import Any

from torch import nn

from convtap._result import call as _now


class Call(_now.Call):
    """A call of version 0.1.0, whose record had another name."""

    __slots__ = ()

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        self.__class__ = _now.Call  # type: ignore[assignment]
        _, values = state
        for name, value in values.items():
            setattr(self, name.replace("_tally", "_record"), value)


class Tally(_now.LayerRecord):
    """The record of a layer of version 0.1.0, which held the module's class."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.LayerRecord  # type: ignore[assignment]
        kind = state.pop("kind", None)
        self.__init__(state.pop("name"), isinstance(kind, type) and issubclass(kind, nn.Conv1d))  # type: ignore[misc]
        self.__dict__.update(state)
