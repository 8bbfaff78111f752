"""Numbers the batches of a data set in an order that a resumed run finds again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from convtap._dataset.loader_worker import EndingWorker
from convtap._dataset.options import ExtractOptions
from convtap._errors import InvalidType, InvalidValue

#: Whether to compute a batch, by its number.
Wanted = Callable[[int], bool]


class Even(Sequence[list[int]]):
    """The samples 0 to ``length`` in batches of ``size``; the last one is smaller."""

    def __init__(self, length: int, size: int) -> None:
        self.samples = length
        self.size = size

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def rows(self, number: int) -> int:
        """Returns the number of samples in a batch."""
        return min(self.size, self.samples - number * self.size)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return list(range(number * self.size, min((number + 1) * self.size, self.samples)))


class MapPlan:
    """Batches of a map-style data set, loaded by a ``DataLoader``.

    Attributes:
        identity: the properties of the data that a resumed run compares.
    """

    def __init__(self, dataset: Any, groups: Sequence[list[int]], settings: dict[str, Any]) -> None:
        self._dataset = dataset
        self._groups = groups
        self._settings = settings
        even = isinstance(groups, Even)
        twice = None if even else repeated(groups)
        if twice is not None:
            raise InvalidValue(
                f"sample {twice} is in the data loader's batches more than once, but a store holds each id once. Pass a "
                "batch_sampler that yields each index once."
            )
        self.identity = {
            "length": len(dataset),
            "batches": len(groups),
            "batch_size": groups.size if isinstance(groups, Even) else None,
            "composition": None if even else _digest_of(groups),
        }

    def count(self, wanted: Wanted) -> int | None:
        """Counts the samples in the wanted batches."""
        groups = self._groups
        if isinstance(groups, Even):
            return sum(groups.rows(number) for number in range(len(groups)) if wanted(number))
        return sum(len(group) for number, group in enumerate(groups) if wanted(number))

    def batches(
        self, wanted: Wanted, looked: Sequence[int] = ()
    ) -> Generator[tuple[int, list[int] | None, Any], None, None]:
        """Yields the number, indices and content of ``looked``, then wanted batches.

        A batch that is only looked at is skipped if it cannot be read.
        """
        first = [number for number in looked if number < len(self._groups) and not wanted(number)]

        def numbers() -> Iterator[int]:
            return itertools.chain(first, filter(wanted, range(len(self._groups))))

        chosen = (self._groups[number] for number in numbers())
        loader = iter(DataLoader(self._dataset, batch_sampler=chosen, **self._settings))
        for place, number in enumerate(numbers()):
            try:
                batch = next(loader)
            except Exception:
                if place < len(first):
                    continue
                raise
            yield number, self._groups[number], batch

    def some(self, looked: Sequence[int]) -> Generator[tuple[int, list[int] | None, Any], None, None]:
        """Yields the batches with these numbers."""
        return self.batches(lambda number: False, looked)

    def again(self, number: int) -> Any:
        """Reads a batch again; returns None if it cannot be read."""
        return next((batch for _, _, batch in self.some([number])), None)


class IterPlan:
    """Any iterable of batches; unwanted batches are skipped.

    Attributes:
        seen: the number of batches, once the iterable is exhausted.
    """

    seen: int | None = None

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        count = len(batches) if isinstance(batches, Sequence) else None
        self.identity: dict[str, Any] = {"length": None, "batches": count, "batch_size": None, "composition": None}

    def count(self, wanted: Wanted) -> int | None:
        """Returns None, since the number of samples of an iterable is unknown."""
        return None

    def batches(
        self, wanted: Wanted, looked: Sequence[int] = ()
    ) -> Generator[tuple[int, list[int] | None, Any], None, None]:
        """Yields each batch that is wanted or in ``looked``, as they come."""
        number = -1
        for number, batch in enumerate(self._batches):
            if wanted(number) or number in looked:
                yield number, None, batch
        self.seen = number + 1

    def some(self, looked: Sequence[int]) -> Generator[tuple[int, list[int] | None, Any], None, None]:
        """Yields these batches of a sequence, or the first batch of another iterable.

        A generator is closed afterwards, so that a later loop cannot mistake it for a complete one.
        """
        if isinstance(self._batches, Sequence):
            yield from ((number, None, self._batches[number]) for number in looked if number < len(self._batches))
            return
        for batch in self._batches:
            yield 0, None, batch
            break
        if isinstance(self._batches, Generator):
            self._batches.close()

    def again(self, number: int) -> Any:
        """Reads a batch of a sequence again; returns None for other iterables."""
        return self._batches[number] if isinstance(self._batches, Sequence) else None


def plan(data: Any, options: ExtractOptions) -> MapPlan | IterPlan:
    """Returns the plan by which ``data`` is read.

    Raises:
        InvalidType: ``data`` is not a data set, a loader or an iterable of batches.
        InvalidValue: ``data`` is empty, or its batches change each time they are read.
    """
    batch_size = options.batch_size
    settings = {"num_workers": options.num_workers, "collate_fn": options.collate_fn}
    has_settings = (batch_size, *settings.values()) != (1, 0, None)
    settings["worker_init_fn"] = EndingWorker(None) if options.num_workers else None
    if isinstance(data, DataLoader):
        if has_settings:
            raise InvalidValue(
                "batch_size, num_workers and collate_fn do not apply to a DataLoader, which has its own. Set them there: "
                "DataLoader(dataset, batch_size=16)."
            )
        return _from_loader(data)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidValue(f"batch_size={batch_size!r} is not a positive int. Pass a number of samples: batch_size=16.")
    if isinstance(data, IterableDataset):
        return IterPlan(DataLoader(data, batch_size=batch_size, **settings))  # type: ignore[arg-type]
    if _is_map_style(data):
        return MapPlan(data, _nonempty(Even(_length(data), batch_size)), settings)
    if isinstance(data, (Tensor, str, bytes, dict)) or hasattr(data, "__array__") or not isinstance(data, Iterable):
        raise InvalidType(
            f"data is a {type(data).__name__}. Pass a map-style Dataset, a DataLoader or an iterable of batches. For a tensor "
            "with samples on axis 0 write TensorDataset(x), or [x] for a single batch."
        )
    if has_settings:
        raise InvalidValue(
            f"batch_size, num_workers and collate_fn do not apply to a {type(data).__name__}, which is an iterable of "
            "batches. Remove them, or pass single samples as a Dataset or a DataLoader."
        )
    if isinstance(data, Sequence):
        _nonempty(data)
    return IterPlan(data)


def _is_map_style(data: Any) -> bool:
    if isinstance(data, Dataset):
        return True
    plain = isinstance(data, (list, tuple, range, dict, str, bytes, Tensor)) or hasattr(data, "__array__")
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        raise InvalidType(
            f"the {type(data).__name__} has no length, so its samples cannot be numbered. Define __len__, or derive it from "
            "IterableDataset."
        ) from None


def _nonempty(groups: Any) -> Any:
    if not len(groups):
        raise InvalidValue("the data has length 0. Pass a data set with at least one sample.")
    return groups


def _from_loader(loader: DataLoader[Any]) -> MapPlan | IterPlan:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return IterPlan(loader)
    settings = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "pin_memory_device",
        )
    }
    if loader.num_workers:
        settings["worker_init_fn"] = EndingWorker(loader.worker_init_fn)
    return MapPlan(loader.dataset, _nonempty(_groups(loader)), settings)


def _groups(loader: DataLoader[Any]) -> Sequence[list[int]]:
    batching: Any = loader.batch_sampler
    if type(batching) is not BatchSampler:
        return _stable(batching, _OTHER_BATCHES)
    # a DistributedSampler divides single samples among the ranks, some of them twice; extract divides whole batches
    if type(batching.sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return Even(_length(loader.dataset), batching.batch_size)
    order = _stable(batching.sampler, _OTHER_SAMPLES)
    return [order[start : start + batching.batch_size] for start in range(0, len(order), batching.batch_size)]


_OTHER_SAMPLES = (
    "draws other samples each time, so a resumed run could not find the missing ones. Pass each sample once: "
    "DataLoader(Subset(dataset, indices), ...)."
)
_OTHER_BATCHES = (
    "makes other batches each time it is read, but the batches of a store must stay the same. Fix its seed, or let it shuffle "
    "whole batches only."
)


def _stable(sampler: Any, problem: str) -> list[Any]:
    """Returns the items of a sampler, sorted if it shuffles.

    A sampler does not tell whether it shuffles, so it is read again. Few items are read several times: they can come in the
    same order by chance (three items in one of six times), and a resumed run would then refuse its own store.
    """

    def read() -> list[Any]:
        return [list(item) if isinstance(item, Iterable) else item for item in sampler]

    first = read()
    others = [read() for _ in range(1 if len(first) > 20 else 24)]
    if all(first == other for other in others):
        return first
    if any(sorted(first) != sorted(other) for other in others):
        raise InvalidValue(f"the {type(sampler).__name__} {problem}")
    return sorted(first)


def _digest_of(groups: Sequence[list[int]]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr(group).encode())
    return digest.hexdigest()[:24]


def repeated(groups: Iterable[Iterable[Any]]) -> Any:
    """Returns the first item that occurs twice, or None."""
    seen: set[Any] = set()
    for group in groups:
        for item in group:
            if item in seen:
                return item
            seen.add(item)
    return None
