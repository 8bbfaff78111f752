"""Writes and reads the folder of ``convtap run``."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convtap._atomic_write import write_whole
from convtap._cli.terminal import complain
from convtap._errors import ConvtapError, InvalidValue, StoreError
from convtap._result.activations import Activations, log_of
from convtap._result.file import unwritable
from convtap._result.keys import numbered
from convtap._result.origin import own_version
from convtap._result.samples import Samples
from convtap._time.signal import signal_of

OUTPUTS, INPUTS = "activations.safetensors", "inputs.safetensors"
PICTURE, REPORT = "activations.png", "report.html"

_KEY, _FORMAT = "convtap_run", 1

# Note: [The folder of a run]
# Assumption: the user who draws a saved run has the folder, but maybe neither the model nor the input files.
# Failure: a picture lacks the signal and shows frames instead of seconds, or the command imports and runs code that a
#   downloaded folder names.
# Choice: one file beside the outputs keeps the signals, their rates and each layer's place on the time axis. Reading it
#   imports nothing. It also records the size of the outputs' file, which detects a file that belongs to other outputs.


class SavedLayerTime:
    """A layer's place on the time axis, from ``convtap.timeline``.

    Attributes:
        stride: input samples from one frame to the next.
        dim: the time axis of the output, counted from the end.
        path: the tensor of a structured output that this describes.
        segments: the number of segments that the time axis is cut into.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.stride: float = about["stride"]
        self.dim: int | None = about["dim"]
        self.path: str = about["path"]
        self.segments: int = about["segments"]
        self._first: float = about["centre"]

    def centre(self, t: int) -> float:
        """Returns the centre of frame t on the input's axis, in samples."""
        return self._first + self.stride * t


class SavedTimeline(Mapping[str, SavedLayerTime]):
    """The layers of a run on the time axis of an input, by key.

    Attributes:
        time_dim: the time axis of the signal, counted from the end.
        input_length: the number of samples of the input.
    """

    def __init__(self, about: Mapping[str, Any], signal: Tensor | None = None) -> None:
        self.time_dim: int = about["time_dim"]
        self.input_length: int = about["input_length"] if signal is None else signal.shape[self.time_dim]
        self._layers = {key: SavedLayerTime(layer) for key, layer in about["layers"].items()}

    def __getitem__(self, key: str) -> SavedLayerTime:
        return self._layers[key]

    def __iter__(self) -> Any:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass
class Run:
    """The description of a run, without its outputs.

    Attributes:
        about: the versions, the date, the model and the options, and one entry of ``inputs`` per forward pass.
        signals: the inputs that can be drawn, by the number of their forward pass.
    """

    about: dict[str, Any] = field(default_factory=dict)
    signals: dict[int, Tensor] = field(default_factory=dict)

    def drawn(self, acts: Activations, sample: int) -> dict[str, Any]:
        """Returns the picture arguments of one input: signal, sample rate and timeline."""
        samples, times, inputs = Samples(log_of(acts)), self.about.get("timeline"), self.about.get("inputs", [])
        number = samples.locate(sample)[0].calls[0].forward if samples.passes else 0
        signal = self.signals.get(number)
        rate = (
            inputs[number]["sample_rate"] if number < len(inputs) and not (signal is None and times is None) else None
        )
        timeline = None if times is None else SavedTimeline(times, signal)
        return {"signal": signal, "sample_rate": rate, "timeline": timeline}


def described(
    spec: str, model: nn.Module, options: Mapping[str, Any], inputs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the ``Run.about`` of a run."""
    return {
        "convtap": own_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": spec,
        "class": type(model).__name__,
        "options": dict(options),
        "inputs": list(inputs),
    }


def signal_in(example: Any) -> Tensor | None:
    """Returns the signal of an example, or None if it cannot be drawn."""
    try:
        _, found = signal_of(example)
    except ConvtapError:
        return None
    drawable = 1 <= found.dim() <= 3 and found.numel() and not found.is_quantized and not found.is_sparse
    return found.detach().cpu().contiguous() if drawable else None


def saved_times(timeline: Any, acts: Activations) -> dict[str, Any]:
    """Returns the places of the captured layers on the time axis, as plain values."""
    counts: Counter[str] = Counter()
    for (layer, _), count in Counter((call.layer, call.forward) for call in acts.calls()).items():
        counts[layer] = max(counts[layer], count)
    layers: dict[str, Any] = {}
    for layer, count in counts.items():
        numbers = [numbered(layer, k, count, mark, "") for mark in ("#", "##") for k in range(count)]
        for key in dict.fromkeys([layer, *numbers]):
            try:
                entry = timeline[key]
                stride, centre = float(entry.stride), float(entry.centre(0))
            except ConvtapError:  # the place of the layer is unknown
                continue
            place = {"stride": stride, "centre": centre, "dim": entry.dim}
            layers[key] = {**place, "path": entry.path, "segments": entry.segments}
    return {"time_dim": timeline.time_dim, "input_length": timeline.input_length, "layers": layers}


def check_folder(folder: Path) -> None:
    """Checks that a folder exists or can be created, before a long run.

    Raises:
        StoreError: the folder is not writable.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise StoreError(f"{str(there)!r} is a file, not a folder. Choose another folder: --out outputs")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(f"the folder {str(there)!r} is not writable. Choose another folder: --out outputs")


def make_folder(folder: Path) -> None:
    """Creates a folder if it does not exist.

    Raises:
        StoreError: the folder cannot be created.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the folder {str(folder)!r} cannot be created: {error.strerror or error}. Choose another one: --out outputs"
        ) from error


def write(folder: Path, acts: Activations, run: Run) -> list[Path]:
    """Writes the outputs and the description of the run. Returns the files.

    Raises:
        StoreError: a file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    outputs, inputs = folder / OUTPUTS, folder / INPUTS
    make_folder(folder)
    try:
        inputs.unlink(missing_ok=True)  # a file that exists here is from an earlier run
        acts.save(outputs)
        content = {**run.about, "format": _FORMAT, "bytes": outputs.stat().st_size}
        metadata = {_KEY: json.dumps(content)}
        tensors = {str(number): signal for number, signal in run.signals.items()}
        write_whole(inputs, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:
        raise StoreError(unwritable(inputs, error)) from error
    return [outputs, inputs]


def _check(about: Mapping[str, Any]) -> None:
    """Reads every entry, and raises KeyError or TypeError if one is missing."""
    for key in ("class", "model", "date", "convtap", "torch"):
        about[key] + ""
    dict(about["options"])
    for one in about["inputs"]:
        one["name"] + one["described"]
        float(one["sample_rate"] or 1)
    if about["timeline"] is not None:
        SavedTimeline(about["timeline"])


def read(outputs: Path) -> Run:
    """Reads the description of the run that wrote a file of outputs.

    It is empty if ``convtap run`` did not write the file.

    Raises:
        StoreError: the file of the inputs is damaged, or was written by a newer convtap.
    """
    from safetensors import SafetensorError, safe_open

    path = outputs.parent / INPUTS
    if outputs.name != OUTPUTS or not path.is_file():
        return Run()
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            if about["format"] > _FORMAT:
                raise InvalidValue(
                    f"{str(path)!r} was written by a newer convtap. Update convtap: pip install -U convtap"
                )
            signals = {int(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        _check(about)
        if about["bytes"] != outputs.stat().st_size:
            complain(f"note: {path} belongs to other outputs, so the pictures have no signal and no common time axis.")
            return Run()
        return Run(about, signals)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConvtapError):
            raise
        raise StoreError(
            f"{str(path)!r} is damaged: {error!r}. Remove the file to draw pictures without the signal."
        ) from error
