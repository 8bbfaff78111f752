"""Holds the gradient of one call's output."""

from __future__ import annotations

from typing import Any

from convtap._errors import NotCaptured
from convtap._tensors.nested import Leaves, map_leaves


class _Place:
    """Stands for a tensor in the structure of an output."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class Gradient:
    """The gradient of one call's output, once a backward pass brings it.

    Attributes:
        nbytes: how many bytes it takes, known before it is there.
        missing: why none can be there yet, or None.
    """

    __slots__ = ("__weakref__", "_found", "_structure", "missing", "nbytes")

    def __init__(self, output: Leaves, nbytes: int, missing: str | None) -> None:
        self._structure = output.rebuild(map(_Place, output.paths))
        self.nbytes = nbytes
        self.missing = missing
        self._found: dict[str, Any] = {}

    def put(self, path: str, value: Any) -> None:
        """Keeps the gradient of one tensor of the output, in place of an earlier backward pass's."""
        self._found[path] = value

    def read(self, key: str) -> Any:
        """Returns the gradient, in the structure that the output has, or None if no backward pass reached it.

        Raises:
            NotCaptured: there can be none; ``key`` names the call.
        """
        if self._found:
            return map_leaves(lambda place: self._found.get(place.path), self._structure, _Place)
        if self.missing is not None:
            raise NotCaptured(f"there is no gradient of {key!r}: {self.missing}.")
        return None
