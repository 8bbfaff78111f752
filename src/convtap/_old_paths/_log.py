"""Loads ``Log`` from pickles of version 0.1.0."""

from __future__ import annotations

from typing import Any

from convtap._result import log as _now


class Log(_now.Log):
    """A log of version 0.1.0, whose records had another name.

    It lacked some fields.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.Log  # type: ignore[assignment]
        self.__init__(records=state.pop("tallies"))  # type: ignore[misc]
        self.__dict__.update(state)
