"""Files that appear whole or not at all: what is there while one is written, after a failure, and for whom."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from torch import nn

from convtap import capture
from convtap._atomic_write import write_whole
from convtap._dataset.extract import extract
from tests.test_structure import PACKAGE


def test_the_name_stands_for_the_old_content_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    seen = []

    def write(temporary):
        temporary.write_text("ne")
        seen.append((file.read_text(), temporary.name))
        temporary.write_text("new")
        return 3

    assert write_whole(file, write) == 3
    assert seen[0][0] == "old"
    assert seen[0][1].startswith(".")
    assert seen[0][1].endswith(".part")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_whole(file, fail)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_first_of_two_writers_wins_if_nothing_is_to_be_replaced(tmp_path):
    file = tmp_path / "a"
    write_whole(file, lambda temporary: temporary.write_text("first"), replace=False)
    with pytest.raises(FileExistsError):
        write_whole(file, lambda temporary: temporary.write_text("second"), replace=False)
    assert file.read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_every_file_that_is_written_has_the_permissions_that_the_mask_allows(tmp_path):
    model, x = nn.Sequential(nn.Conv1d(1, 2, 3)), torch.zeros(2, 1, 8)
    with capture(model) as acts:
        model(x)
    before = os.umask(0o027)
    try:
        acts.save(tmp_path / "acts.safetensors")
        acts.report(tmp_path / "report.html")
        extract(model, [x], tmp_path / "store", progress=False)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(written) == 6  # the two files, and store.json, .beginning.json, a shard and finished.json
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}


def test_no_other_module_makes_temporary_files():
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "_atomic_write.py"]
    assert not [path.name for path in others if "mkstemp" in path.read_text() or '.part"' in path.read_text()]
