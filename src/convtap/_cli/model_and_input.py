"""Reads the model and the input that a command names: ``pkg.module:factory``, a file of numbers or sound, or a shape."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convtap._cli.demo import read_wav
from convtap._errors import InvalidType, InvalidValue, MissingExtra, StoreError, did_you_mean, one_line

_WRITE = (
    "Write pkg.module:factory, where factory is a function without arguments that returns the model (or is the model)."
)


def load_model(spec: str) -> nn.Module:
    """Returns the model that a factory makes. The current folder is searched for its module first.

    The random seed is 0 while it is made, so that a model with random weights is the same one every time.

    Raises:
        InvalidValue: there is no such module or factory, or importing or calling it fails.
        InvalidType: the factory does not return an ``nn.Module``.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise InvalidValue(f"{spec!r} is no factory. {_WRITE}")
    found: Any = _import(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            raise InvalidValue(f"{module_name!r} has no {path!r}.{did_you_mean(name, dir(found))}")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InvalidType(f"{spec!r} is a {type(found).__name__}, no function and no model. {_WRITE}")
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found = found()
        except Exception as error:
            raise InvalidValue(f"{spec!r} failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(found, nn.Module):
        raise InvalidType(f"{spec!r} returned a {type(found).__name__}, no torch.nn.Module. {_WRITE}")
    return found


def _import(name: str) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InvalidValue(
                f"there is no module {name!r} in the current folder or among the installed packages."
            ) from None
        raise InvalidValue(f"importing {name!r} failed: {one_line(error)}") from error
    except Exception as error:
        raise InvalidValue(f"importing {name!r} failed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(here)


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads a shape: ``"1,1,16000"``.

    Raises:
        InvalidValue: the text is not a shape.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidValue(f"{text!r} is no shape. Write numbers between commas: 1,1,16000") from None


def random_input(text: str) -> Tensor:
    """Returns an input of a shape, with the same standard normal numbers every time."""
    shape = parse_shape(text)
    if any(size < 1 for size in shape):
        raise InvalidValue(f"the shape {text} has an axis of less than 1. Write for example 1,1,16000")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def read_input(path: str, shape: str | None = None) -> Any:
    """Reads an input: ``.npy``, ``.wav`` (as (1, channels, samples)) or ``.pt`` (a tensor, or a tuple, list or dict of them).

    Args:
        shape: another shape for the tensor; -1 for the rest.

    Raises:
        StoreError: the file does not exist or cannot be read.
        InvalidValue: another kind of file, or a shape of another size.
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
        try:
            import soundfile
        except ImportError:
            raise MissingExtra(f"{one_line(error)} Or let soundfile read it: pip install soundfile") from None
    samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()).unsqueeze(0)
