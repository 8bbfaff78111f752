"""The demo: what it prints, what it saves, and the sound files it reads."""

from __future__ import annotations

import struct
import wave

import pytest
import torch

from convtap import load
from convtap._cli.demo import SPEECH, AudioEncoder, ecg, five_layers, read_wav
from convtap.cli import main


def test_demo_shows_each_layer_and_each_input_and_saves_what_it_says(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for i in range(1, 6):
        assert f"conv{i}  (3, " in text
        assert f"    2  conv{i}  (" in text
    assert "2.00 s at 16000 Hz" in text
    assert f"acts = load({str(tmp_path / 'five_layers.safetensors')!r})" in text
    acts = load(tmp_path / "five_layers.safetensors")
    torch.manual_seed(0)
    model, x = five_layers().eval(), ecg()
    with torch.no_grad():
        torch.testing.assert_close(acts["conv1"], model[0](x), rtol=0, atol=0)
        hidden = x
        for i in range(5):
            conv, relu = model[2 * i], model[2 * i + 1]
            hidden = conv(hidden)
            assert torch.equal(acts[f"conv{i + 1}"], hidden)
            hidden = relu(hidden.clone())
    assert len(load(tmp_path / "audio_encoder.safetensors")) == 8


def test_demo_takes_a_sound_file_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack("<4000h", *([1000, -1000] * 2000)))
    assert main(["demo", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "mine.wav: 2 channel(s), 0.25 s at 8000 Hz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_text("no sound"), "is no PCM WAV file"),
        (lambda path: path.write_bytes(SPEECH.read_bytes()[:100]), "needs 400"),
    ],
)
def test_a_bad_sound_file_is_one_line_and_status_2(make, message, tmp_path, capsys):
    path = tmp_path / "x.wav"
    make(path)
    assert main(["demo", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width_are_read_exactly(width, tmp_path):
    scale = 1 << (8 * width - 1)
    values = [0, 1, -1, scale - 1, -scale, scale // 3]
    path = tmp_path / "x.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(16000)
        shifted = [value + 128 if width == 1 else value for value in values]
        file.writeframes(b"".join(v.to_bytes(width, "little", signed=width > 1) for v in shifted))
    waveform, rate = read_wav(path)
    assert rate == 16000
    expected = torch.tensor(values, dtype=torch.float64).div(scale).float().reshape(3, 2).T
    assert torch.equal(waveform, expected)


def test_the_recording_is_two_seconds_of_sound_under_100_kb():
    waveform, rate = read_wav(SPEECH)
    assert (tuple(waveform.shape), rate) == ((1, 32000), 16000)
    assert SPEECH.stat().st_size < 100_000
    assert waveform.abs().max() > 0.1


def test_the_encoder_gives_a_frame_for_20_ms():
    assert AudioEncoder().eval()(torch.zeros(1, 16000)).shape == (1, 49, 96)
