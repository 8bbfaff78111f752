"""Sound files: every usual kind of WAV gives the numbers that were written, and a broken one is an error."""

from __future__ import annotations

import struct
import sys
import types
import wave

import numpy as np
import pytest
import torch

from convtap import InvalidValue, MissingExtra, StoreError
from convtap._cli.demo import SPEECH
from convtap._cli.sound import read_sound

GUID = bytes.fromhex("000000001000800000aa00389b71")


def riff(*chunks, kind=b"RIFF"):
    """A RIFF file of chunks (name, content), padded to even lengths."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return kind + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def form(kind=1, channels=1, rate=8000, width=2, bits=None):
    frame = channels * width
    return struct.pack("<HHIIHH", kind, channels, rate, rate * frame, frame, bits or 8 * width)


def extensible(kind, channels, rate, width):
    tail = struct.pack("<HHIH", 22, 8 * width, 0, kind) + GUID
    return form(0xFFFE, channels, rate, width) + tail


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_every_width_are_read_exactly(width, tmp_path):
    scale = 1 << (8 * width - 1)
    values = [0, 1, -1, scale - 1, -scale, scale // 3]
    path = tmp_path / "x.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, width, 16000, 0, "NONE", ""))
        shifted = [value + 128 if width == 1 else value for value in values]
        file.writeframes(b"".join(v.to_bytes(width, "little", signed=width > 1) for v in shifted))
    waveform, rate = read_sound(path)
    assert rate == 16000
    expected = torch.tensor(values, dtype=torch.float64).div(scale).float().reshape(3, 2).T
    assert torch.equal(waveform, expected)


@pytest.mark.parametrize("code", ["f", "d"])
@pytest.mark.parametrize("make", [lambda width: form(3, 1, 44100, width), lambda width: extensible(3, 1, 44100, width)])
def test_floats_are_read_as_they_are(code, make, tmp_path):
    values = [0.0, 0.5, -1.5, 1e-7]
    path = tmp_path / "x.wav"
    data = struct.pack(f"<4{code}", *values)
    path.write_bytes(riff((b"fmt ", make(struct.calcsize(code))), (b"fact", b"\4\0\0\0"), (b"data", data)))
    waveform, rate = read_sound(path)
    assert rate == 44100
    assert torch.equal(waveform, torch.tensor([values]))


def test_the_extensible_form_is_read_and_chunks_around_the_sound_are_skipped(tmp_path):
    path = tmp_path / "x.wav"
    data = b"".join(v.to_bytes(3, "little", signed=True) for v in (1 << 22, -(1 << 22), 5, -(1 << 23)))
    chunks = [
        (b"LIST", b"odd"),
        (b"fmt ", extensible(1, 2, 48000, 3)),
        (b"bext", b"12345"),
        (b"data", data),
        (b"id3 ", b"x"),
    ]
    path.write_bytes(riff(*chunks))
    waveform, rate = read_sound(path)
    assert rate == 48000
    assert waveform.tolist() == [[0.5, 5 / 2**23], [-0.5, -1.0]]


@pytest.mark.parametrize("said", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_length_that_a_program_could_not_go_back_to_write_is_the_rest_of_the_file(said, tmp_path):
    path = tmp_path / "x.wav"
    content = riff((b"fmt ", form()), (b"data", struct.pack("<3h", 16384, 0, -16384)))
    path.write_bytes(content[:-10] + struct.pack("<I", said) + content[-6:])
    assert read_sound(path)[0].tolist() == [[0.5, 0, -0.5]]


def test_a_file_of_more_than_4_gib_says_its_length_elsewhere(tmp_path):
    path = tmp_path / "x.wav"
    data = struct.pack("<2h", 16384, -32768)
    ds64 = struct.pack("<QQQI", 0, len(data), 2, 0)
    content = riff((b"ds64", ds64), (b"fmt ", form()), (b"data", data), kind=b"RF64")
    path.write_bytes(content[:-8] + b"\xff" * 4 + content[-4:] + b"junk")
    assert read_sound(path)[0].tolist() == [[0.5, -1.0]]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (SPEECH.read_bytes()[:1000], StoreError, "it has 956 of its 64,000 bytes of data"),
        (SPEECH.read_bytes()[:30], StoreError, "its format chunk is truncated"),
        (SPEECH.read_bytes()[:40], StoreError, "it ends before its data begins"),
        (riff((b"data", b"12"), (b"fmt ", form())), StoreError, "its data comes before its format"),
        (
            riff((b"fmt ", form()), (b"data", b"123")),
            StoreError,
            "its 3 bytes of data are not a multiple of 2 bytes per frame",
        ),
        (riff((b"fmt ", form(channels=0)), (b"data", b"12")), StoreError, "its format has 0 channels"),
        (riff((b"fmt ", form(rate=0)), (b"data", b"12")), StoreError, "0 frames per second"),
        (riff((b"fmt ", form()), (b"data", b"")), InvalidValue, "holds 0 samples"),
        (riff((b"fmt ", form(7, width=1)), (b"data", b"1")), MissingExtra, "it is a WAV file of mu-law"),
        (riff((b"fmt ", form(1, width=8)), (b"data", b"12345678")), MissingExtra, "a WAV file of 64-bit integers"),
        (b"no sound", MissingExtra, "it is not a WAV file. Install it (pip install soundfile)"),
        (b"", MissingExtra, "ffmpeg -i x.wav x.16bit.wav"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(content, error, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_sound(path)
    assert says in str(caught.value)


def test_a_missing_file_and_a_folder_say_so(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        read_sound(tmp_path / "x.wav")
    with pytest.raises(StoreError, match="cannot be read: "):
        read_sound(tmp_path)


def test_other_kinds_of_sound_are_read_with_soundfile(tmp_path, monkeypatch):
    def read(path, dtype, always_2d):
        assert (path.name, dtype, always_2d) == ("x.flac", "float32", True)
        return np.array([[0.5, -0.5], [0.25, 0]], np.float32), 22050

    monkeypatch.setitem(sys.modules, "soundfile", types.SimpleNamespace(read=read))
    (tmp_path / "x.flac").write_bytes(b"fLaC")
    waveform, rate = read_sound(tmp_path / "x.flac")
    assert (waveform.tolist(), rate) == ([[0.5, 0.25], [-0.5, 0]], 22050)


def test_the_recording_is_two_seconds_of_sound_under_100_kb():
    waveform, rate = read_sound(SPEECH)
    assert (tuple(waveform.shape), rate) == ((1, 32000), 16000)
    assert SPEECH.stat().st_size < 100_000
    assert waveform.abs().max() > 0.1
