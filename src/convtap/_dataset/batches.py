"""Numbers the batches of a data set or an iterable, in an order that a resume finds again."""

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

#: Whether a batch is to be computed, by its number.
Wanted = Callable[[int], bool]


class Even(Sequence[list[int]]):
    """The samples 0 to ``length`` in order, ``size`` a batch; the last batch holds the rest."""

    def __init__(self, length: int, size: int) -> None:
        self.samples = length
        self.size = size

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def rows(self, number: int) -> int:
        """Returns how many samples a batch has."""
        return min(self.size, self.samples - number * self.size)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return list(range(number * self.size, min((number + 1) * self.size, self.samples)))


class MapPlan:
    """Batches of a map-style data set, loaded by a ``DataLoader``.

    Attributes:
        identity: what a resume must find again.
    """

    def __init__(self, dataset: Any, groups: Sequence[list[int]], settings: dict[str, Any]) -> None:
        self._dataset = dataset
        self._groups = groups
        self._settings = settings
        even = isinstance(groups, Even)
        twice = None if even else repeated(groups)
        if twice is not None:
            raise InvalidValue(
                f"sample {twice} is in the data loader's batches more than once, and a store holds each id once."
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
        """Yields the number, the indices and the content of each batch that is looked at, then of each wanted one.

        A batch that is looked at only and cannot be read is left out.
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
        """Yields some of the batches."""
        return self.batches(lambda number: False, looked)

    def again(self, number: int) -> Any:
        """Reads a batch once more; None if it cannot be read."""
        return next((batch for _, _, batch in self.some([number])), None)


class IterPlan:
    """Any iterable of batches; unwanted batches are passed over.

    Attributes:
        seen: how many batches there are, once the end was reached.
    """

    seen: int | None = None

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        count = len(batches) if isinstance(batches, Sequence) else None
        self.identity: dict[str, Any] = {"length": None, "batches": count, "batch_size": None, "composition": None}

    def count(self, wanted: Wanted) -> int | None:
        """Returns None: the number of samples of an iterable is not known."""
        return None

    def batches(
        self, wanted: Wanted, looked: Sequence[int] = ()
    ) -> Generator[tuple[int, list[int] | None, Any], None, None]:
        """Yields the number and the content of each batch that is wanted or looked at, as they come."""
        number = -1
        for number, batch in enumerate(self._batches):
            if wanted(number) or number in looked:
                yield number, None, batch
        self.seen = number + 1

    def some(self, looked: Sequence[int]) -> Generator[tuple[int, list[int] | None, Any], None, None]:
        """Yields some of the batches: of a sequence those that are asked for, of another iterable the first.

        A generator is closed after that, so that it cannot be taken for a whole one.
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
        """Reads a batch once more; None if it cannot be read. What passes in an order of its own has no second look."""
        return self._batches[number] if isinstance(self._batches, Sequence) else None


def plan(data: Any, options: ExtractOptions) -> MapPlan | IterPlan:
    """Decides how data is read.

    Raises:
        InvalidType: it is neither a data set, nor a loader, nor an iterable of batches.
        InvalidValue: it is empty, or its batches are others each time.
    """
    batch_size = options.batch_size
    settings = {"num_workers": options.num_workers, "collate_fn": options.collate_fn}
    has_settings = (batch_size, *settings.values()) != (1, 0, None)
    settings["worker_init_fn"] = EndingWorker(None) if options.num_workers else None
    if isinstance(data, DataLoader):
        if has_settings:
            raise InvalidValue("the DataLoader has its own batch_size, num_workers and collate_fn: set them there.")
        return _from_loader(data)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidValue(f"batch_size={batch_size!r} must be a positive number of samples, such as 16.")
    if isinstance(data, IterableDataset):
        return IterPlan(DataLoader(data, batch_size=batch_size, **settings))  # type: ignore[arg-type]
    if _is_map_style(data):
        return MapPlan(data, _nonempty(Even(_length(data), batch_size)), settings)
    if isinstance(data, (Tensor, str, bytes, dict)) or hasattr(data, "__array__") or not isinstance(data, Iterable):
        raise InvalidType(
            f"data is a {type(data).__name__}. Pass a map-style Dataset, a DataLoader, or an iterable of batches; a tensor "
            "with samples on axis 0 is TensorDataset(x), or [x] as a single batch."
        )
    if has_settings:
        raise InvalidValue(
            f"data is a {type(data).__name__}, an iterable of batches already, so batch_size, num_workers and collate_fn "
            "mean nothing for it. For single samples pass a Dataset or a DataLoader."
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
            f"the {type(data).__name__} has no length, so its samples cannot be numbered. Give it __len__, or make it an "
            "IterableDataset."
        ) from None


def _nonempty(groups: Any) -> Any:
    if not len(groups):
        raise InvalidValue("the data has length 0: there is nothing to extract.")
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
    # a DistributedSampler deals single samples to ranks, some of them twice; here whole batches are dealt
    if type(batching.sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return Even(_length(loader.dataset), batching.batch_size)
    order = _stable(batching.sampler, _OTHER_SAMPLES)
    return [order[start : start + batching.batch_size] for start in range(0, len(order), batching.batch_size)]


_OTHER_SAMPLES = (
    "draws other samples each time, so a resume could not tell what is missing. Give the samples once each: "
    "DataLoader(Subset(dataset, indices), ...)."
)
_OTHER_BATCHES = (
    "makes other batches each time it is read, and the batches of a store must stay the same: fix its seed, or let it shuffle "
    "whole batches only."
)


def _stable(sampler: Any, problem: str) -> list[Any]:
    """Returns what a sampler yields: in its own order if it has one, sorted if it shuffles.

    A sampler does not say whether it shuffles, so it is read again; a few items more often, since they come in the same
    order by chance (three items in one of six times), and a resume would then refuse its own store.
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
    """Returns the first thing that is there twice, or None."""
    seen: set[Any] = set()
    for group in groups:
        for item in group:
            if item in seen:
                return item
            seen.add(item)
    return None
