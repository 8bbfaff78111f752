"""Reads the input that the command line is given: a file of numbers or sound, or a shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtap._cli.demo import read_wav
from convtap._errors import InvalidValue, MissingExtra, StoreError, one_line


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads a shape: ``"1,1,16000"``.

    Raises:
        InvalidValue: it is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidValue(f"{text!r} is no shape. Write numbers between commas: 1,1,16000") from None


def random_input(text: str) -> Tensor:
    """Makes an input of a shape, of the same standard normal numbers every time."""
    shape = parse_shape(text)
    if any(size < 1 for size in shape):
        raise InvalidValue(f"the shape {text} has an axis of less than 1. Write for example 1,1,16000")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def read_input(path: str, shape: str | None = None) -> Any:
    """Reads an input: ``.npy``, ``.wav`` (as (1, channels, samples)) or ``.pt`` (a tensor, or a tuple, list or dict of them).

    Args:
        shape: another shape for the tensor; -1 for the rest.

    Raises:
        StoreError: the file is not there or cannot be read.
        InvalidValue: another kind of file, or a shape that it does not fit into.
    """
    readers = {".npy": _read_npy, ".wav": _read_wav, ".pt": _read_pt, ".pth": _read_pt}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise InvalidValue(f"{path!r}: an input is a .npy, .wav or .pt file.")
    if not Path(path).is_file():
        raise StoreError(f"there is no file {path!r}.")
    try:
        found = reader(path)
    except (StoreError, MissingExtra):
        raise
    except Exception as error:
        raise StoreError(f"{path!r} cannot be read: {one_line(error)}") from error
    if shape is None:
        return found
    if not isinstance(found, Tensor):
        raise InvalidValue(
            f"{path!r} holds a {type(found).__name__}, which --shape cannot reshape; only a tensor can be."
        )
    try:
        return found.reshape(parse_shape(shape))
    except RuntimeError as error:
        raise InvalidValue(f"{path!r} holds {tuple(found.shape)}, which is not {shape}: {one_line(error)}") from None


def _read_npy(path: str) -> Tensor:
    import numpy

    values = numpy.load(path, allow_pickle=False)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def _read_pt(path: str) -> Any:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message is a page, and recommends loading it unsafely
        raise StoreError(
            f"{path!r} cannot be read: it is no file of torch.save, or holds more than tensors in tuples, lists and dicts "
            "(nothing else is loaded, since that could run code)."
        ) from error
    found = tuple(found) if isinstance(found, list) else found
    if not isinstance(found, (Tensor, tuple, dict)):
        raise StoreError(
            f"{path!r} holds a {type(found).__name__}, and an input is a tensor, a tuple or a dict of them."
        )
    return found


def _read_wav(path: str) -> Tensor:
    try:
        return read_wav(path)[0].unsqueeze(0)
    except InvalidValue as error:  # such as floating-point samples, which the standard library does not read
        return _read_wav_elsewhere(path, error)


def _read_wav_elsewhere(path: str, error: Exception) -> Tensor:
    """Reads what the standard library cannot, such as floating-point samples."""
    try:
        import soundfile
    except ImportError:
        raise MissingExtra(f"{one_line(error)} Or let soundfile read it: pip install soundfile") from None
    samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()).unsqueeze(0)
