"""Finds the positions of samples by ids or by a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, StoreError, brief

_LARGEST = 2**63 - 1


class SamplePositions:
    """Finds ids in an array of all ids, which are int64 or text.

    Consecutive ids, such as those of a data set, are found by subtraction. Others are sorted at the first lookup.
    """

    def __init__(self, ids: Any) -> None:
        self._ids = ids
        self._is_text = ids.dtype.kind == "U"
        self._first: int | None = None
        self._order: Any = None

    def find(self, id: Any) -> int | None:
        """Returns the position of an id, or None if it is missing.

        Raises:
            StoreError: several samples have the id.
        """
        if self._order is None:
            self._sort()
        if self._first is not None and type(id) is int:
            position = id - self._first
            return position if 0 <= position < len(self._ids) else None
        if not self._is_one(id):
            return None
        import numpy as np

        (position,) = self.find_all(np.array([id], self._ids.dtype if not self._is_text else None)).tolist()
        return None if position < 0 else int(position)

    def find_all(self, wanted: Any) -> Any:
        """Returns an array of the positions of ids, -1 for a missing one.

        Args:
            wanted: an array of ints, or of text if the ids are text.

        Raises:
            StoreError: several samples have one of the ids.
        """
        import numpy as np

        if self._order is None:
            self._sort()
        if wanted.dtype.kind == "O":  # some of the ints exceed int64
            found = [self.find(id) for id in wanted.tolist()]
            return np.array([-1 if position is None else position for position in found], np.int64)
        if not len(self._ids) or not len(wanted) or (wanted.dtype.kind == "U") != self._is_text:
            return np.full(len(wanted), -1)
        if wanted.dtype.kind == "u":
            wanted = np.where(wanted > _LARGEST, self._ids.min() - 1, wanted.astype(np.int64))
        if self._first is not None:
            positions = wanted - self._first
            return np.where((wanted >= self._first) & (positions < len(self._ids)), positions, -1)
        low = np.searchsorted(self._ids, wanted, "left", sorter=self._order)
        at = self._order[np.minimum(low, len(self._ids) - 1)]
        is_there = self._ids[at] == wanted
        after = self._order[np.minimum(low + 1, len(self._ids) - 1)]
        double = is_there & (low + 1 < len(self._ids)) & (self._ids[after] == wanted)
        if double.any():
            id = wanted[double][0].item()
            raise StoreError(f"several samples have the id {id!r}. Read them by position: view[a:b].")
        return np.where(is_there, at, -1)

    def _sort(self) -> None:
        import numpy as np

        ids = self._ids
        if not self._is_text and len(ids) and (np.diff(ids) == 1).all():
            self._first, self._order = int(ids[0]), ids[:0]
        else:
            self._order = np.argsort(ids, kind="stable")

    def _is_one(self, id: Any) -> bool:
        """Whether a value has the type of the ids."""
        import numpy as np

        if self._is_text:
            return isinstance(id, str)
        is_int = isinstance(id, (int, np.integer)) and not isinstance(id, bool)
        return is_int and -_LARGEST - 1 <= id <= _LARGEST


def as_array(ids: Any) -> Any:
    """Returns ids or a mask as a one-dimensional array, or None for a single id.

    Raises:
        InvalidType: the items are not ints, texts or bools, or have several axes.
    """
    import numpy as np

    if isinstance(ids, Tensor):
        ids = ids.tolist() if ids.is_floating_point() else ids.detach().cpu().numpy()
    if isinstance(ids, tuple):
        raise InvalidType(
            f"view[{brief(ids)}] is indexed by a tuple, which does not select samples. Pass a list of ids: "
            f"view[{brief(list(ids))}]."
        )
    if isinstance(ids, range):
        ids = np.arange(ids.start, ids.stop, ids.step)
    if not isinstance(ids, list) and (not hasattr(ids, "__array__") or isinstance(ids, np.generic)):
        return None
    ids = _array_of(ids) if isinstance(ids, list) else np.asarray(ids)
    if ids.ndim == 0:
        return None
    if ids.dtype.kind == "O":
        return _array_of(ids.tolist())
    if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iuUb"):
        raise InvalidType(
            f"view[{brief(ids)}] is indexed by an array of {ids.dtype} with {ids.ndim} axes, which does not select samples. "
            "Pass an array of ids (ints or texts) or a mask (bools) with one axis."
        )
    return ids


def _array_of(ids: list[Any]) -> Any:
    import numpy as np

    kinds = {_kind(type_) for type_ in set(map(type, ids))}
    if len(kinds) > 1 or None in kinds:
        raise InvalidType(
            f"view[{brief(ids)}] is indexed by a list that is not all ints, all texts or all bools. Pass ids or a mask, or a "
            "slice of positions: view[0:10]."
        )
    try:
        return np.array(ids, np.int64) if kinds == {"int"} else np.array(ids)
    except OverflowError:
        return np.array(ids, object)


def _kind(type_: type) -> str | None:
    import numpy as np

    kinds = {"bool": (bool, np.bool_), "int": (int, np.integer), "text": (str,)}
    return next((kind for kind, types in kinds.items() if issubclass(type_, types)), None)


def positions_of(mask: Any, count: int) -> Any:
    """Returns the positions that a mask selects.

    Raises:
        InvalidValue: the length of the mask is not the number of samples.
    """
    import numpy as np

    if len(mask) != count:
        raise InvalidValue(
            f"the mask has {len(mask)} entries for {count} samples. Pass one bool for each sample of the view."
        )
    return np.nonzero(mask)[0]
