"""Reads WAV files, and other sound files with the package soundfile."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convtap._errors import InvalidValue, MissingExtra, StoreError, one_line

#: The suffixes of sound files.
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")

# Note: [WAV files]
# Assumption: a WAV file is a list of chunks. "fmt " describes the numbers, and "data" holds them.
# Failure: the standard library refuses floating-point samples and, before Python 3.12, WAVE_FORMAT_EXTENSIBLE, which most
#   programs write for 24 bits. It reads a truncated file without an error.
# Choice: read the chunks here. A file that ends before its data does is an error. Programs that cannot seek back write a
#   placeholder length (all ones, or nearly 2 GiB), which is read as the rest of the file.

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_OTHERS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x31: "GSM", 0x50: "MPEG", 0x55: "MP3"}
_GUID = bytes.fromhex("000000001000800000aa00389b71")
_UNKNOWN_LENGTH = 0x7FFFF000


class _Form(NamedTuple):
    """The format of a WAV file: number type, channels, rate, bytes per number."""

    kind: int
    channels: int
    rate: int
    width: int


class _OtherForm(Exception):
    """The file is in a format that this module does not read."""


def read_sound(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """Reads a float32 waveform (channels, T) in -1 … 1, and its sample rate.

    See Note: [WAV files].

    Raises:
        StoreError: the file does not exist, or is damaged.
        InvalidValue: the file holds no samples.
        MissingExtra: reading the file needs another package.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            form, data = _read_wav(stream, os.fstat(stream.fileno()).st_size)
    except FileNotFoundError:
        raise StoreError(f"the file {str(path)!r} does not exist. Pass the path of a sound file.") from None
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error.strerror or error}. Pass another file.") from error
    except _OtherForm as error:
        return _with_soundfile(file, str(error))
    except ValueError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error}. Copy it again, or pass another file.") from None
    samples = _numbers(data, form).reshape(-1, form.channels).T
    return _checked(file, torch.from_numpy(np.ascontiguousarray(samples))), form.rate


def _read_wav(stream: BinaryIO, size: int) -> tuple[_Form, Any]:
    """Reads the chunks up to the data.

    Raises:
        _OtherForm: the file is not a WAV file of integers or floats.
        ValueError: the file is a damaged WAV file.
    """
    kind, _, wave = struct.unpack("<4sI4s", stream.read(12).ljust(12))
    if kind not in (b"RIFF", b"RF64") or wave != b"WAVE":
        raise _OtherForm("it is not a WAV file")
    form: _Form | None = None
    long: int | None = None  # the length of the data, in a file of more than 4 GiB
    while len(head := stream.read(8)) == 8:
        name, length = struct.unpack("<4sI", head)
        if name == b"data":
            if form is None:
                raise ValueError("its data comes before its format")
            return form, _data(stream, length if long is None else long, size - stream.tell(), form)
        body = stream.read(length) if name in (b"fmt ", b"ds64") else b""
        if name == b"fmt ":
            form = _form(body)
        elif name == b"ds64" and len(body) >= 16:
            long = struct.unpack("<Q", body[8:16])[0]
        else:
            stream.seek(length, os.SEEK_CUR)
        stream.seek(length % 2, os.SEEK_CUR)
    raise ValueError("it ends before its data begins")


def _form(body: bytes) -> _Form:
    if len(body) < 16:
        raise ValueError("its format chunk is truncated")
    kind, channels, rate, _, frame, _ = struct.unpack("<HHIIHH", body[:16])
    if kind == _EXTENSIBLE and len(body) >= 40 and body[26:40] == _GUID:
        kind = struct.unpack("<H", body[24:26])[0]
    if kind not in (_PCM, _FLOAT):
        raise _OtherForm(f"it is a WAV file of {_OTHERS.get(kind, f'kind {kind:#x}')}")
    if not (channels and rate and frame) or frame % channels:
        raise ValueError(f"its format has {channels} channels, {frame} bytes per frame and {rate} frames per second")
    width = frame // channels
    if width not in ((1, 2, 3, 4) if kind == _PCM else (4, 8)):
        raise _OtherForm(f"it is a WAV file of {8 * width}-bit {'integers' if kind == _PCM else 'floats'}")
    return _Form(kind, channels, rate, width)


def _data(stream: BinaryIO, length: int, left: int, form: _Form) -> Any:
    frame = form.channels * form.width
    if length > left:
        if length < _UNKNOWN_LENGTH:
            raise ValueError(f"it has {left:,} of its {length:,} bytes of data")
        length = left - left % frame
    if length % frame:
        raise ValueError(f"its {length:,} bytes of data are not a multiple of {frame} bytes per frame")
    return np.fromfile(stream, np.uint8, length)


def _numbers(data: Any, form: _Form) -> Any:
    if form.kind == _FLOAT:
        return data.view(f"<f{form.width}").astype(np.float32)
    if form.width == 1:  # unsigned, unlike all wider integers
        return (data.astype(np.float32) - 128) / 128
    if form.width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = data.reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    return data.view(f"<i{form.width}").astype(np.float32) / np.float32(2 ** (8 * form.width - 1))


def _with_soundfile(path: Path, why: str) -> tuple[Tensor, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its C library is missing
        target = f"{path.stem}{'.16bit' if path.suffix.lower() == '.wav' else ''}.wav"
        raise MissingExtra(
            f"{str(path)!r} cannot be read without soundfile: {why}. Install it (pip install soundfile), or convert the file: "
            f"ffmpeg -i {path.name} {target}"
        ) from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError) as error:  # soundfile raises a RuntimeError for an unreadable file
        raise StoreError(
            f"{str(path)!r} cannot be read: {why}, and soundfile says {one_line(error).rstrip('.')!r}. Pass a sound file."
        ) from error
    return _checked(path, torch.from_numpy(samples.T.copy())), int(rate)


def _checked(path: Path, waveform: Tensor) -> Tensor:
    if not waveform.numel():
        raise InvalidValue(f"{str(path)!r} holds 0 samples. Pass a longer recording.")
    return waveform
