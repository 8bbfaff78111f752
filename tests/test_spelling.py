"""A script prints every view in any encoding, and the columns of a table stay aligned."""

from __future__ import annotations

import io
import os
import sys

import pytest

from convtap import LayerNotFound
from convtap._spelling import printable
from convtap._table import Table
from tests.process import run_python

SCRIPT = """
import torch
from torch import nn
from convtap import capture, compare, finite, list_layers, statistics, timeline

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.größe模 = nn.Conv1d(1, 2, 3)
        self.last = nn.Conv1d(2, 1, 3)

    def forward(self, x):
        return self.last(self.größe模(x))

a, b, x = Net().eval(), Net().eval(), torch.randn(2, 1, 50)
with capture(a) as acts, statistics(a) as stats:
    a(x)
with finite(b, raise_at="never") as found:
    b(x / 0)
lower = {"atol": 1e-3, "sqnr_db": 20}
for view in (acts, acts.coverage, acts.calls(), stats, stats["größe模"], compare(a, b, example=x), found, found.first,
             compare(a, b, example=x, **lower), compare(stats, stats), list_layers(a, example=x), timeline(a, x),
             timeline(a, x)["größe模"]):
    print(view)
for item in (list_layers(a, example=x)[0], compare(a, b, example=x).first, compare(stats, stats)[0], acts.coverage["größe模"]):
    print(repr(item))
try:
    acts["größ模"]
except KeyError as error:
    print(error, repr(error))
"""

BEFORE = """
import io, sys
utf8, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO(), encoding="{0}")
"""
AFTER = """
sys.stdout.flush()
utf8.write(sys.stdout.buffer.getvalue().decode(sys.stdout.encoding))
"""


@pytest.fixture(scope="module")
def in_utf8():
    done = run_python(SCRIPT, variables={"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_script_prints_every_view(encoding, in_utf8):
    done = run_python(f"{BEFORE.format(encoding)}{SCRIPT}{AFTER}", variables={"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert {"√", "≤", "←", "×", "−", "模"} <= set(in_utf8)
    assert done.stdout.count("\\u6a21") == in_utf8.count("模")
    assert len(done.stdout.splitlines()) == len(in_utf8.splitlines())


def test_the_columns_of_a_table_stay_aligned(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    lines = str(Table(("layer", "shape"), [("größe→", "(…)"), ("a", "b")])).splitlines()
    assert lines == ["layer          shape", "-------------  -----", "gr\\xf6\\xdfe->  (...)", "a              b"]


def test_a_sign_that_the_encoding_has_is_kept(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp437"))
    assert printable("≤ √ε ×") == "≤ √ε x"


@pytest.mark.parametrize("stream", [None, io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")])
def test_a_stream_that_takes_any_text_gets_it_unchanged(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    assert printable("größe→") == "größe→"


def test_a_path_that_is_not_text_is_spelled_in_utf8_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert printable(os.fsdecode(b"a\xff")) == ("a\\udcff" if os.name != "nt" else os.fsdecode(b"a\xff"))


def test_an_error_keeps_its_arguments(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    error = LayerNotFound("größe→")
    assert (str(error), error.args) == ("gr\\xf6\\xdfe->", ("größe→",))
