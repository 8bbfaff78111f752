"""The command line and its terminal: any encoding, readers that go, interrupts, progress, and the exit statuses."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import convtap.cli
from convtap import CoverageWarning
from convtap._spelling import spelled
from convtap.cli import main
from tests.process import SRC

NETS = """
import torch
from torch import nn


def build():
    print("größe ∞ 模")
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv1d(2, 3, 3, padding=1))


def other():
    model = build()
    model[2].bias.data += 1
    return model


def stops():
    raise KeyboardInterrupt


def deep():
    return nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(120)))
"""

#: Every command with text that has signs: (arguments, exit status).
COMMANDS = [
    (["layers", "nets:build", "--example", "1,1,16"], 0),
    (["layers", "nets:deep"], 0),
    (["run", "nets:build", "--input", "größe_模.npy", "--out", "größe_a", "--finite"], 0),
    (["run", "nets:other", "--input", "größe_模.npy", "--out", "b"], 0),
    (["compare", "größe_a", "b"], 1),
    (["compare", "größe_a", "größe_a"], 0),
    (["stats", "nets:build", "--shape", "2,1,16", "--out", "s.st"], 0),
    (["info", "größe_a", "--stats"], 0),
    (["info", "s.st"], 0),
    (["info", "größe_模"], 2),
    (["layers", "nets:bauen_模"], 2),
]
HELP = [[], *([name] for name in ("demo", "layers", "run", "stats", "plot", "report", "info", "compare", "verify"))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    np.save(tmp_path / "größe_模.npy", np.ones((1, 1, 16), np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


def run(argv, monkeypatch, encoding):
    """Runs a command with streams of an encoding. Returns its status and what it wrote to each."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            status = main(list(argv))
        except SystemExit as stop:
            status = stop.code
        assert [stream.errors for stream in streams] == ["strict", "strict"]
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


def columns(text):
    """Joins columns by one space, since a spelled sign may make a column wider."""
    return re.sub("[ -]+", " ", text)


def test_every_command_prints_in_any_encoding_without_a_question_mark(here, monkeypatch):
    signs = set()
    for argv, expected in COMMANDS:
        plain = run(argv, monkeypatch, "utf-8")
        assert plain[0] == expected, (argv, plain)
        signs.update(sign for text in plain[1:] for sign in text if not sign.isascii())
        for encoding in ("cp1252", "cp437", "ascii"):
            found = run(argv, monkeypatch, encoding)
            assert found[0] == expected
            for text, original in zip(found[1:], plain[1:], strict=True):
                kept = "".join(sign if sign.encode(encoding, "ignore") else spelled(sign) for sign in original)
                assert columns(text) == columns(kept)
                assert text.count("?") == original.count("?")
    assert {"×", "…", "≤", "√", "ö", "模", "∞"} <= signs


def test_help_and_pictures_need_no_more_than_ascii(here, monkeypatch):
    for argv in ([*command, "--help"] for command in HELP):
        assert run(argv, monkeypatch, "ascii")[0::2] == (0, "")
    command = ["run", "nets:build", "--shape", "1,1,16", "--out", "größe_b", "--plot", "--report"]
    assert run(command, monkeypatch, "ascii")[1].endswith("wrote gr\\xf6\\xdfe_b/report.html\n")


@pytest.mark.parametrize(
    ("sign", "text"),
    [
        ("×", "x"),
        ("–", "-"),
        ("−", "-"),
        ("±", "+/-"),
        ("…", "..."),
        ("é", "\\xe9"),
        ("ß", "\\xdf"),
        ("\u0301", "\\u0301"),
        ("µ", "u"),
        ("₂", "2"),
        ("⁻", "-"),
        ("模", "\\u6a21"),
    ],
)
def test_a_sign_is_spelled_in_ascii(sign, text):
    assert spelled(sign) == text


def test_help_says_what_the_exit_statuses_mean_and_shows_a_working_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.partition("exit status:\n")[2].splitlines()] == ["0", "1", "2", "130"]
    for (command,) in HELP[1:]:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"example: convtap {command} " in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"convtap {convtap.__version__}\n"


# -- readers that go


class Broken(io.TextIOBase):
    """A stream whose reader has gone, or whose disk is full."""

    def __init__(self, number):
        self.number = number
        self.tries = 0

    def write(self, text):
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EINVAL])  # the second is what Windows says
def test_a_reader_that_has_enough_leaves_the_exit_status_and_the_files(here, monkeypatch, capsys, number):
    assert main(["run", "nets:build", "--shape", "1,1,16", "--out", "a"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert main(["run", "nets:deep", "--shape", "1,1,16", "--out", "b"]) == 0
    assert sys.stdout.tries > 0
    assert (here / "b" / "inputs.safetensors").exists()
    assert main(["compare", "a", "b", "--atol", "0"]) == 1
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_a_failure(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert main(["layers", "nets:deep"]) == 2
    assert capsys.readouterr().err == (
        "convtap: standard output cannot be written: No space left on device. Redirect it to another file.\n"
    )


BATCH = """
import json, os, sys
from convtap.cli import main

for argv, status in json.loads(sys.argv[1]):
    found = main(argv)
    assert found == status, (argv, found)
    sys.modules.pop("nets", None)
os.dup2(int(sys.argv[2]), 1)
sys.exit(main(["layers", "nets:deep"]))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the devices of Linux")
def test_processes_print_in_the_encoding_of_their_terminal_and_end_well_without_one(here):
    """One process in the C locale ends at a closed pipe, and one with the encoding of a console ends at a full disk."""
    commands = json.dumps([one for one in COMMANDS if all(text.isascii() for text in one[0])])
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    ends = [
        subprocess.Popen(
            [sys.executable, "-c", BATCH, commands, str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[out],
            env={**os.environ, "PYTHONPATH": str(SRC), **settings},
        )
        for out, settings in ((write, locale), (full, {"PYTHONIOENCODING": "cp437"}))
    ]
    os.close(write)
    os.close(full)
    texts = [end.communicate() for end in ends]
    for out, err in texts:
        assert b"module x 1" in out, err
        assert b"100 of 120 rows shown" in out
    assert (ends[0].returncode, texts[0][1]) == (0, b"")
    assert ends[1].returncode == 2
    assert texts[1][1].startswith(b"convtap: standard output cannot be written")
    assert texts[1][1].count(b"\n") == 1


# -- ends


def test_an_interrupt_is_status_130_without_a_word(here, capsys):
    assert main(["layers", "nets:stops"]) == 130
    assert capsys.readouterr() == ("", "")


def failing(error):
    def run(args):
        raise error

    def parser():
        found = argparse.ArgumentParser()
        found.set_defaults(run=run)
        return found

    return parser


def test_a_bug_of_the_library_is_status_2_and_not_that_something_differs(monkeypatch, capsys):
    monkeypatch.setattr(convtap.cli, "_parser", failing(AssertionError("impossible")))
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("convtap: this error is a bug in convtap. Report it together with the lines below.\n")
    assert err.endswith("AssertionError: impossible\n")


def test_an_error_of_the_system_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(convtap.cli, "_parser", failing(PermissionError(errno.EACCES, "Permission denied", "x.npy")))
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "convtap: a file cannot be read or written: Permission denied (x.npy). Check its folder.\n"
    )


def test_warnings_of_convtap_are_notes_and_others_stay_warnings(monkeypatch, capsys):
    def run(args):
        for _ in range(2):
            warnings.warn("a layer\nwas idle", CoverageWarning, stacklevel=1)
        with pytest.warns(DeprecationWarning, match="of the model"):
            warnings.warn("of the model", DeprecationWarning, stacklevel=1)
        return 0

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    monkeypatch.setattr(convtap.cli, "_parser", lambda: parser)
    assert main([]) == 0
    assert capsys.readouterr().err == "note: a layer was idle\n"


# -- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("watched", [True, False])
def test_progress_is_shown_on_a_terminal_only_and_goes(here, monkeypatch, watched):
    stream = Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["run", "nets:build", "--input", "*.npy", "--input", "*.npy", "--out", "a", "--report"]) == 0
    text = stream.getvalue()
    if not watched:
        assert text == ""
        return
    for step in ("running größe_模.npy", "following the time axis", "writing", "drawing report.html"):
        assert step in text
    assert "4/5 [" in text
    assert text.rstrip("\r").endswith(" ")  # the bar is wiped out
