"""The public function ``load``."""

from __future__ import annotations

import os

from convtap._public import public
from convtap._result.activations import Activations
from convtap._result.file import read


@public
def load(path: str | os.PathLike[str]) -> Activations:
    """Loads the outputs that ``Activations.save`` wrote, in order, on the CPU.

    Tuples, lists, dicts and a ``PackedSequence`` keep their types. A named tuple or a ``ModelOutput`` keeps its class if the
    class is imported already. Otherwise a named tuple has the same fields, and a ``ModelOutput`` becomes a dict. A dataclass
    becomes a dict of its fields, and any other mapping a dict. ``load`` unpickles nothing and imports nothing.

    Raises:
        StoreError: the file does not exist, is incomplete, or was not written by ``save``.
    """
    return Activations(read(path))
