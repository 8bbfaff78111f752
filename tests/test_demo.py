"""The demo: what it prints, what it saves, and the sound files it reads."""

from __future__ import annotations

import struct
import sys
import wave

import pytest
import torch

from convtap import load
from convtap._cli.demo import SPEECH, AudioEncoder, ecg, five_layers
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


def short(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(600))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist. Pass the path of a sound file."),
        (lambda path: path.write_text("no sound"), "pip install soundfile"),
        (
            lambda path: path.write_bytes(SPEECH.read_bytes()[:100]),
            "it has 56 of its 64,000 bytes of data",
        ),
        (lambda path: short(path), "has 300 samples, but one frame of the encoder needs 400. Pass a longer sound."),
    ],
)
def test_a_bad_sound_file_is_one_line_and_status_2(make, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = tmp_path / "x.wav"
    make(path)
    assert main(["demo", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_encoder_gives_a_frame_for_20_ms():
    assert AudioEncoder().eval()(torch.zeros(1, 16000)).shape == (1, 49, 96)
