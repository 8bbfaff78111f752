"""Opens a path: saved outputs, the folder of a run, saved statistics or a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from convtap._cli import run_folder
from convtap._cli.run_folder import OUTPUTS, Run
from convtap._errors import InvalidValue, OutOfRange, StoreError, did_you_mean, listed, plural
from convtap._result.activations import Activations
from convtap._result.call import Call, LayerRecord
from convtap._result.load import load
from convtap._result.log import Log
from convtap._result.statistics import Statistics
from convtap._tensors.layout import Layout

STATISTICS = "statistics.safetensors"


@dataclass
class Saved:
    """The contents of a path. Exactly one of acts, stats and store is not None.

    Attributes:
        path: the file, or the folder of a store.
        acts: the outputs of a capture.
        stats: statistics.
        store: a ``Store``.
        run: the description of the run that wrote the outputs.
    """

    path: Path
    acts: Activations | None = None
    stats: Statistics | None = None
    store: Any = None
    run: Run = field(default_factory=Run)

    @property
    def kind(self) -> str:
        """The kind of the contents, in words."""
        return "a capture" if self.acts is not None else "statistics" if self.stats is not None else "a store"


def open_saved(text: str) -> Saved:
    """Opens a file or a folder.

    Raises:
        StoreError: the path does not exist, is damaged, or was not written by convtap.
    """
    path = Path(text)
    if path.is_dir():
        for name in (OUTPUTS, STATISTICS):
            if (path / name).is_file():
                return _open_file(path / name)
        return Saved(path, store=_open_store(path))
    if not path.exists():
        folder = path.parent
        names = [str(folder / other.name) for other in folder.iterdir()] if folder.is_dir() else []
        raise StoreError(
            f"{text!r} does not exist.{did_you_mean(text, names) or ' Write it with convtap run or acts.save.'}"
        )
    return _open_file(path)


def _open_file(path: Path) -> Saved:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.metadata() or {})
    except (SafetensorError, OSError):
        keys = set()  # load reports the problem
    if "convtap_statistics" in keys:
        return Saved(path, stats=Statistics.load(path))
    if "convtap_run" in keys:
        raise StoreError(f"{str(path)!r} holds the inputs of a run. Pass its folder: {str(path.parent)!r}.")
    return Saved(path, acts=load(path), run=run_folder.read(path))


def _open_store(folder: Path) -> Any:
    from convtap._dataset.layout import DESCRIPTION, rank_folders
    from convtap._dataset.store import Store

    if (folder / DESCRIPTION).exists() or rank_folders(folder):
        return Store(folder)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    fix = (
        f"Pass one of its files: {listed(files)}."
        if files
        else "Write it with convtap run, or fill a store with extract(...)."
    )
    raise StoreError(f"the folder {str(folder)!r} has no {OUTPUTS} and is not a store. {fix}")


def activations_of(saved: Saved, sample: str | None) -> tuple[Activations, int, str]:
    """Returns the outputs to draw, the number of the input among them, and a note.

    Args:
        saved: the opened path.
        sample: the number of the input, or its id in a store; None for the first.

    Raises:
        InvalidValue: the path holds statistics, or ``sample`` is not a number.
        OutOfRange: the sample does not exist in the store.
    """
    if saved.store is not None:
        id = _id_of(saved.store, sample)
        return _as_capture(saved.store, id), 0, f"sample {id} of {plural(len(saved.store), 'sample')}"
    if saved.acts is None:
        raise InvalidValue(f"{str(saved.path)!r} holds statistics, not outputs. Draw it: convtap plot {saved.path}")
    try:
        number = 0 if sample is None else int(sample)
    except ValueError:
        raise InvalidValue(
            f"--sample {sample} is not the number of an input. Write --sample 0 for the first input."
        ) from None
    return saved.acts, number, ""


def _id_of(store: Any, sample: str | None) -> Any:
    ids = store.ids
    if not ids:
        raise OutOfRange(f"the store {str(store.path)!r} holds 0 samples. Fill it with extract(...).")
    if sample is None:
        return ids[0]
    found = next((id for id in ids if str(id) == sample), None)
    if found is None:
        some = [str(id) for id in ids[:2000]]
        raise OutOfRange(
            f"sample {sample!r} does not exist in the store. Its ids are {listed(some, 4)}.{did_you_mean(sample, some)}"
        )
    return found


def _as_capture(store: Any, id: Any) -> Activations:
    """Returns one sample of a store as the outputs of one forward pass."""
    rows: Iterable[tuple[str, Tensor]] = store.sample(id).items()
    log = Log(selected=dict.fromkeys(store.layers))
    for number, (name, row) in enumerate(rows):
        record = log.records[name] = LayerRecord(name, is_conv1d=False)
        record.layout = Layout(last=store[name].time_dim == -2)
        record.captured = record.ran = record.held = 1
        log.calls[number] = Call(record, 0, 0, "module", row.unsqueeze(0))
    return Activations(log)
