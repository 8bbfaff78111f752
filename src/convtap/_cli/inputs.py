"""Reads the inputs of a command: arrays, sound files, tensors or random numbers."""

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
        name: its file, as the user wrote it, or its shape.
        example: the argument for the model.
        sample_rate: its samples per second, if known.
    """

    name: str
    example: Any
    sample_rate: float | None = None

    @property
    def about(self) -> dict[str, Any]:
        """Its name, sample rate, shape and type, without its values."""
        return {"name": self.name, "sample_rate": self.sample_rate, "described": self.described}

    @property
    def described(self) -> str:
        """Its shape and type, for a message."""
        if not isinstance(self.example, Tensor):
            return f"of type {type(self.example).__name__}"
        shape = ",".join(map(str, self.example.shape))
        return f"of shape {shape} ({str(self.example.dtype).removeprefix('torch.')})"


def find_files(inputs: Sequence[str]) -> list[str]:
    """Returns the files that paths, folders and patterns name.

    Raises:
        StoreError: a file does not exist, a folder holds no input, or a pattern matches no file.
        InvalidValue: the type of a file is not supported.
    """
    found: list[str] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in _KNOWN)
            if not inside:
                raise StoreError(f"the folder {text!r} holds no inputs. {_KINDS}.")
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
            raise InvalidValue(f"{text!r} is not an input file. {_KINDS}.")
        if not Path(text).is_file():
            raise StoreError(f"the file {text!r} does not exist. {_KINDS}.")
    return found


def read_inputs(
    files: Sequence[str], shape: str | None = None, sample_rate: float | None = None, batch_size: int | None = None
) -> Iterator[Iterator[Given]]:
    """Yields the inputs of each file, or random numbers without files.

    Args:
        files: the files to read, in this order.
        shape: a shape to reshape each tensor to, with -1 for the axis that takes the rest; the shape of random numbers.
        sample_rate: the rate of files that do not contain it.
        batch_size: the number of rows of a tensor per input; None for all.
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
        raise InvalidValue(f"{given.name!r} is {given.described}, and has no rows to split. Remove --batch-size.")
    for part in torch.split(given.example, batch_size):
        yield Given(given.name, part, given.sample_rate)


def _rate(file: str, own: float | None, asked: float | None) -> float | None:
    if own is not None and asked is not None and own != asked:
        raise InvalidValue(
            f"{file!r} has {own:g} samples per second, which differs from --sample-rate {asked:g}. Remove --sample-rate, or "
            f"convert the sound: ffmpeg -i {Path(file).name} -ar {asked:g} {Path(file).stem}.{asked:g}.wav"
        )
    return asked if own is None else own


def _reshaped(file: str, example: Any, shape: str | None) -> Any:
    if shape is None:
        return example
    if not isinstance(example, Tensor):
        raise InvalidValue(
            f"{file!r} holds a {type(example).__name__}, but --shape reshapes a single tensor. Remove --shape."
        )
    try:
        return example.reshape(parse_shape(shape))
    except RuntimeError as error:
        raise InvalidValue(
            f"{file!r} of shape {tuple(example.shape)} cannot be reshaped to {shape}: {one_line(error).rstrip('.')}. Write -1 "
            "for the axis that takes the rest: --shape 1,1,-1"
        ) from None


# -- numbers


def parse_shape(text: str) -> tuple[int, ...]:
    """Parses a shape such as ``"1,1,16000"``.

    Raises:
        InvalidValue: the text is not a shape.
    """
    try:
        return tuple(int(part) for part in text.strip("()").rstrip(",").split(","))
    except ValueError:
        raise InvalidValue(f"{text!r} is not a shape. Write numbers separated by commas: 1,1,16000") from None


def random_input(text: str) -> Tensor:
    """Returns an input of a shape, with the same standard normal numbers each time."""
    shape = parse_shape(text)
    if any(size < 1 for size in shape):
        raise InvalidValue(f"the shape {text} has an axis of size less than 1. Write for example 1,1,16000")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def read_example(text: str) -> Given:
    """Returns one input, from a file or as random numbers of a shape."""
    if Path(text).suffix or Path(text).exists():
        (file,) = find_files([text])[:1]
        example, rate = _read(file)
        return Given(file, example, rate)
    return Given(text, random_input(text))


# -- files


def _read(path: str) -> tuple[Any, float | None]:
    """Returns the input that a file holds, and its sample rate if known.

    Sound is (1, channels, samples). Other files hold an array, a tensor, or a tuple or dict of tensors.
    """
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
            f"{path!r} cannot be read: {one_line(error).rstrip('.')}. Write it with numpy.save(path, array)."
        ) from error
    _check(path, found)
    return found


def _read_pt(path: str) -> Any:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message is a page long, and recommends an unsafe load
        raise StoreError(
            f"{path!r} cannot be read: it is not a file of torch.save, or holds objects other than tensors in tuples, lists "
            "and dicts (loading them could run code). Write it with torch.save(tensor, path)."
        ) from error
    found = tuple(found) if isinstance(found, list) else found
    if not isinstance(found, (Tensor, tuple, dict)):
        raise StoreError(
            f"{path!r} holds a {type(found).__name__}, not a tensor, or a tuple or dict of tensors. Write it with "
            "torch.save(tensor, path)."
        )
    _check(path, found)
    return found


def _check(path: str, found: Any) -> None:
    if isinstance(found, Tensor) and not found.numel():
        raise InvalidValue(f"{path!r} is empty: its shape is {tuple(found.shape)}. Pass an input with values.")


def mixed_rates(rates: Sequence[float | None]) -> str:
    """Returns a note if the inputs have several sample rates, or an empty string."""
    known = sorted({rate for rate in rates if rate is not None})
    if len(known) < 2:
        return ""
    counted = ", ".join(f"{plural(rates.count(rate), 'input')} at {rate:g} Hz" for rate in known)
    return f"the inputs have several sample rates ({counted}). convtap does not resample, and a model expects one rate."


def call_error(given: Given) -> tuple[str, str]:
    """Returns the problem and the fix, for a model that fails on an input."""
    shape = given.example.shape if isinstance(given.example, Tensor) else ()
    fix = "Pass an input that the model's forward accepts."
    if len(shape) == 3 and given.sample_rate is not None:
        mono = "" if shape[1] == 1 else f" For a model of one channel, write --shape {shape[1]},1,-1."
        fix = f"If the model takes (inputs, samples), write --shape {shape[1]},-1.{mono}"
    elif isinstance(given.example, Tensor) and not given.example.is_floating_point():
        fix = "If the model takes floating-point numbers, save them as such: array.astype('float32')."
    elif isinstance(given.example, Tensor):
        fix = "If the model takes another shape, write it: --shape 1,1,-1"
    return f"the model fails on {given.name!r}, {given.described}", fix
