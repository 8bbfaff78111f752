"""The ids of samples: the user's, the indices of the data set, or a running count."""

from __future__ import annotations

from typing import Any

from convtap._dataset.index import Index
from convtap._dataset.shard_format import Batch, Id
from convtap._errors import InvalidType, InvalidValue, brief
from convtap._spelling import is_utf8
from convtap._tensors.nested import walk_tensors


def ids_as_list(found: Any) -> Any:
    """Returns the result of ``ids`` as a list if it is an array or an iterable."""
    items = found.tolist() if hasattr(found, "tolist") else found
    return items if isinstance(items, (str, bytes)) or not hasattr(items, "__iter__") else list(items)


class SampleIds:
    """Assigns ids to samples: the user's, the data set's indices, or a running count."""

    def __init__(self, index: Index, *, named: bool, counts: bool) -> None:
        self._named = named
        self._kind: type | None = None
        self._seen: set[Id] = set()
        # the number of samples in each batch so far, from which the running count follows
        self._sizes = dict(index.batches[:, :2].tolist()) if counts else {}
        self._counted = (0, 0)
        if named:
            self._seen.update(index.ids.tolist())
            self._kind = type(index.ids[0].item()) if len(index.ids) else None

    def of(self, number: int, indices: list[int] | None, found: Any, inputs: Any) -> list[Id]:
        """Returns the ids of a batch; ``found`` is the result of the user's ``ids``."""
        if self._named:
            return self._checked(found)
        if indices is not None:
            return [int(index) for index in indices]
        first = next((tensor for _, tensor in walk_tensors(inputs) if tensor.dim()), None)
        if first is None:
            raise InvalidValue(
                "the model's inputs have no tensor with a batch axis, so convtap cannot count the samples. Pass ids=."
            )
        before, count = self._counted
        while before < number:
            count += self._sizes[before]
            before += 1
        self._counted = (before, count)
        self._sizes[number] = first.shape[0]
        return list(range(count, count + first.shape[0]))

    def keep(self, batch: Batch) -> None:
        """Notes the ids of a batch, which later batches must not repeat."""
        if self._named:
            self._seen.update(batch.ids)

    def _checked(self, found: Any) -> list[Id]:
        if not isinstance(found, list):
            raise InvalidType(f"ids(batch) returned {brief(found)}, not a list. Return one int or str for each sample.")
        names: list[Id] = found
        fresh: set[Id] = set()
        for name in names:
            if (
                not isinstance(name, (int, str))
                or isinstance(name, bool)
                or "\0" in str(name)
                or not is_utf8(str(name))
            ):
                raise InvalidType(
                    f"ids(batch) returned the id {name!r}. Return an int or a str (in UTF-8, without NUL) for each sample."
                )
            self._kind = self._kind or type(name)
            if not isinstance(name, self._kind):
                raise InvalidType(
                    f"ids(batch) returned {name!r} among ids of type {self._kind.__name__}. Return only ints, or only strs."
                )
            if name in self._seen or name in fresh:
                raise InvalidValue(
                    f"the id {name!r} occurs twice, but a store holds each id once. Return a different id for each sample."
                )
            fresh.add(name)
        return names
