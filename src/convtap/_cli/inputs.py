"""Reads the inputs that a command names: arrays, sound with its rate, tensors, folders of them, or random numbers."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtap._cli import sound
from convtap._errors import InvalidValue, StoreError, one_line, plural

_ARRAYS = (".npy",)
_TENSORS = (".pt", ".pth")
_KNOWN = (*_ARRAYS, *_TENSORS, *sound.SUFFIXES)
_KINDS = "An input is a .npy file, a sound file such as .wav, or a .pt file"


@dataclass(frozen=True)
class Given:
    """One input of a model.

    Attributes:
        name: the file it comes from, as the user wrote it, or its shape.
        example: what the model is called with.
        sample_rate: its samples a second, if they are known.
    """

    name: str
    example: Any
    sample_rate: float | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What is known of it, without its values."""
        return {"name": self.name, "sample_rate": self.sample_rate, "described": self.described}

    @property
    def described(self) -> str:
        """Its shape and type, for a message."""
        if not isinstance(self.example, Tensor):
            return f"of type {type(self.example).__name__}"
        shape = ",".join(map(str, self.example.shape))
        return f"of shape {shape} ({str(self.example.dtype).removeprefix('torch.')})"


def find_files(inputs: Sequence[str]) -> list[str]:
    """Returns the files that are meant: each as it is, all of a folder, or all that a pattern matches.

    Raises:
        StoreError: there is none.
        InvalidValue: a file is of another kind.
    """
    found: list[str] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in _KNOWN)
            if not inside:
                raise StoreError(f"the folder {text!r} holds no input. {_KINDS}.")
            found += inside
        elif not path.exists() and glob.has_magic(text):
            matches = sorted(glob.glob(text, recursive=True))
            if not matches:
                raise StoreError(f"no file matches {text!r}. {_KINDS}.")
            found += matches
        else:
            found.append(text)
    for text in found:
        if Path(text).suffix.lower() not in _KNOWN:
            raise InvalidValue(f"{text!r} is a file of another kind. {_KINDS}.")
        if not Path(text).is_file():
            raise StoreError(f"there is no file {text!r}. {_KINDS}.")
    return found


def read_inputs(
    files: Sequence[str], shape: str | None = None, sample_rate: float | None = None, batch_size: int | None = None
) -> Iterator[Iterator[Given]]:
    """Yields the inputs of each file; of none, random numbers of a shape.

    Args:
        files: what to read, one after the other.
        shape: another shape for each tensor; -1 for the rest.
        sample_rate: of files that do not say it.
        batch_size: how many rows of a tensor make one input; None for all.
    """
    if not files and shape is not None:
        yield _parts(Given(shape, random_input(shape), sample_rate), batch_size)
    for file in files:
        example, rate = _read(file)
        yield _parts(Given(file, _reshaped(file, example, shape), _rate(file, rate, sample_rate)), batch_size)


def _parts(given: Given, batch_size: int | None) -> Iterator[Given]:
    if batch_size is None:
        yield given
        return
    if not isinstance(given.example, Tensor) or given.example.dim() < 2:
        raise InvalidValue(f"{given.name!r} is {given.described}, which has no rows. Leave --batch-size out.")
    for part in torch.split(given.example, batch_size):
        yield Given(given.name, part, given.sample_rate)


def _rate(file: str, own: float | None, asked: float | None) -> float | None:
    if own is not None and asked is not None and own != asked:
        raise InvalidValue(
            f"{file!r} has {own:g} samples a second, and --sample-rate says {asked:g}. Leave it out, or convert the sound "
            f"first: ffmpeg -i {Path(file).name} -ar {asked:g} {Path(file).stem}.{asked:g}.wav"
        )
    return asked if own is None else own


def _reshaped(file: str, example: Any, shape: str | None) -> Any:
    if shape is None:
        return example
    if not isinstance(example, Tensor):
        raise InvalidValue(f"{file!r} holds a {type(example).__name__}, and --shape is of one tensor. Leave it out.")
    try:
        return example.reshape(parse_shape(shape))
    except RuntimeError as error:
        raise InvalidValue(
            f"{file!r} holds {tuple(example.shape)}, which is not {shape}: {one_line(error).rstrip('.')}. Write -1 for the "
            "axis that takes the rest: --shape 1,1,-1"
        ) from None


# -- numbers


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads a shape: ``"1,1,16000"``.

    Raises:
        InvalidValue: the text is not a shape.
    """
    try:
        return tuple(int(part) for part in text.strip("()").rstrip(",").split(","))
    except ValueError:
        raise InvalidValue(f"{text!r} is not a shape. Write numbers between commas: 1,1,16000") from None


def random_input(text: str) -> Tensor:
    """Returns an input of a shape, with the same standard normal numbers every time."""
    shape = parse_shape(text)
    if any(size < 1 for size in shape):
        raise InvalidValue(f"the shape {text} has an axis of less than 1. Write for example 1,1,16000")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def read_example(text: str) -> Given:
    """Returns one input: of the file that the text names, else of the shape that it is."""
    if Path(text).suffix or Path(text).exists():
        (file,) = find_files([text])[:1]
        example, rate = _read(file)
        return Given(file, example, rate)
    return Given(text, random_input(text))


# -- files


def _read(path: str) -> tuple[Any, float | None]:
    """Reads a file: sound as (1, channels, samples), a tensor or array as it is, or a tuple or dict of tensors."""
    suffix = Path(path).suffix.lower()
    if suffix in _TENSORS:
        return _read_pt(path), None
    if suffix in _ARRAYS:
        return _read_npy(path), None
    waveform, rate = sound.read_sound(path)
    return waveform.unsqueeze(0), float(rate)


def _read_npy(path: str) -> Tensor:
    import numpy

    try:
        values = numpy.load(path, allow_pickle=False)
        found = torch.from_numpy(numpy.array(values, values.dtype.newbyteorder("="), order="C"))
    except Exception as error:
        raise StoreError(
            f"{path!r} cannot be read: {one_line(error).rstrip('.')}. Write it with numpy.save(path, numbers)."
        ) from error
    _check(path, found)
    return found


def _read_pt(path: str) -> Any:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message is a page, and recommends loading it unsafely
        raise StoreError(
            f"{path!r} cannot be read: it is not a file of torch.save, or holds more than tensors in tuples, lists and dicts "
            "(nothing else is loaded, since that could run code). Write it with torch.save(tensor, path)."
        ) from error
    found = tuple(found) if isinstance(found, list) else found
    if not isinstance(found, (Tensor, tuple, dict)):
        raise StoreError(
            f"{path!r} holds a {type(found).__name__}, and an input is a tensor, a tuple or a dict of them. Write it with "
            "torch.save(tensor, path)."
        )
    _check(path, found)
    return found


def _check(path: str, found: Any) -> None:
    if isinstance(found, Tensor) and not found.numel():
        raise InvalidValue(f"{path!r} holds 0 values ({tuple(found.shape)}). Give an input that has some.")


def mixed_rates(rates: Sequence[float | None]) -> str:
    """Says that inputs have several rates, or nothing."""
    known = sorted({rate for rate in rates if rate is not None})
    if len(known) < 2:
        return ""
    counted = ", ".join(f"{plural(rates.count(rate), 'input')} at {rate:g} Hz" for rate in known)
    return f"{counted}: convtap does not resample, and one model expects one rate."


def call_error(given: Given) -> tuple[str, str]:
    """Returns how the message begins when a model fails on an input, and what to do then."""
    shape = given.example.shape if isinstance(given.example, Tensor) else ()
    fix = "Give it what the model's forward takes."
    if len(shape) == 3 and given.sample_rate is not None:
        mono = "" if shape[1] == 1 else f" For a model of one channel, write --shape {shape[1]},1,-1."
        fix = f"If it takes (inputs, samples), write --shape {shape[1]},-1.{mono}"
    elif isinstance(given.example, Tensor) and not given.example.is_floating_point():
        fix = "If it takes floating-point numbers, save them so: numbers.astype('float32')."
    elif isinstance(given.example, Tensor):
        fix = "If it takes another shape, write it: --shape 1,1,-1"
    return f"the model fails on {given.name!r}, {given.described}", fix
