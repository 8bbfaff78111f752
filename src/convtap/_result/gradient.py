"""Holds the gradient of one call's output."""

from __future__ import annotations

from typing import Any

from convtap._errors import NotCaptured
from convtap._tensors.nested import Leaves, map_leaves


class _Place:
    """A placeholder for a tensor in the structure of an output."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class Gradient:
    """The gradient of one call's output, which a backward pass computes.

    Attributes:
        nbytes: the bytes that it takes, known before the backward pass.
        missing: why the gradient cannot exist, as one or more sentences without the last period, or None.
    """

    __slots__ = ("__weakref__", "_found", "_structure", "missing", "nbytes")

    def __init__(self, output: Leaves, nbytes: int, missing: str | None) -> None:
        self._structure = output.rebuild(map(_Place, output.paths))
        self.nbytes = nbytes
        self.missing = missing
        self._found: dict[str, Any] = {}

    def put(self, path: str, value: Any) -> None:
        """Stores the gradient of one tensor, and replaces that of an earlier pass."""
        self._found[path] = value

    def read(self, key: str) -> Any:
        """Returns the gradient in the structure of the output, or None without one.

        Raises:
            NotCaptured: the gradient cannot exist. ``key`` names the call in the message.
        """
        if self._found:
            return map_leaves(lambda place: self._found.get(place.path), self._structure, _Place)
        if self.missing is not None:
            raise NotCaptured(f"{key!r} has no gradient, since {self.missing}.")
        return None
