"""The public ``load``: a file that ``Activations.save`` wrote, as the mapping that was saved."""

from __future__ import annotations

import os

from convtap._public import public
from convtap._result.activations import Activations
from convtap._result.file import read


@public
def load(path: str | os.PathLike[str]) -> Activations:
    """Reads what ``Activations.save`` wrote: the same outputs in the same order, on the CPU.

    Structures come back as they were: tuples, lists, dicts, a ``PackedSequence``, and named tuples and a ``ModelOutput`` in
    their own class if it is imported already (else in a named tuple of the same fields, or a dict). A dataclass comes back
    as a dict of its fields, and any other mapping as a dict. Nothing is unpickled and nothing imported.

    Raises:
        StoreError: there is no such file, or it is not whole, or it was not written by ``save``.
    """
    return Activations(read(path))
