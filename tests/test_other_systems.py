"""What Windows and macOS do otherwise, faked: locks, renaming, and forcing content to the disk."""

from __future__ import annotations

import errno
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import convtap._atomic_write
from convtap import StoreError, capture
from convtap._atomic_write import write_whole
from tests.killed_run import model, run


class WindowsLocks:
    """Locks as those of ``msvcrt``: of bytes from the handle's place on, which others can neither lock nor read."""

    LK_NBLCK = 2

    def __init__(self):
        self.locked: set[tuple[int, int]] = set()
        self.owned: set[int] = set()
        self._read = os.read

    def _bytes(self, handle, count):
        start = os.lseek(handle, 0, os.SEEK_CUR)
        return {(os.fstat(handle).st_ino, place) for place in range(start, start + count)}

    def locking(self, handle, mode, count):
        assert mode == self.LK_NBLCK
        if self._bytes(handle, count) & self.locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        self.locked |= self._bytes(handle, count)
        self.owned.add(handle)

    def read(self, handle, count):
        if handle not in self.owned and self._bytes(handle, count) & self.locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return self._read(handle, count)


@pytest.fixture
def windows_locks(monkeypatch):
    locks = WindowsLocks()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locks.locking, LK_NBLCK=locks.LK_NBLCK))
    monkeypatch.setattr(os, "read", locks.read)
    return locks


def lock_by_another(locks, folder, places):
    """Locks a rank's folder as another process does: these places of the file."""
    (folder / ".lock").write_text("process 7 on other")
    file = os.stat(folder / ".lock").st_ino
    locks.locked, locks.owned = {(file, place) for place in places}, set()


@pytest.mark.parametrize(
    ("places", "owner"), [([1 << 20], "process 7 on other"), ([0, 1 << 20], "another process")], ids=["readable", "not"]
)
def test_a_folder_that_another_process_locked_is_refused_on_windows(
    places, owner, tmp_path, windows_locks, monkeypatch
):
    run(tmp_path, length=30)
    lock_by_another(windows_locks, tmp_path / "rank-00000", places)
    opened, closed, open_, close = [], [], os.open, os.close
    monkeypatch.setattr(os, "open", lambda *args: opened.append(open_(*args)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or close(handle))
    with pytest.raises(StoreError, match=f"^{owner} is extracting into .*rank-00000"):
        run(tmp_path, length=30)
    assert opened
    assert sorted(opened) == sorted(closed)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has another module of locks")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_named(code, tmp_path, monkeypatch):
    import fcntl

    def lockf(handle, mode):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    closed, close = [], os.close
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or close(handle))
    refusal = (
        rf"rank-00000' cannot be locked \({os.strerror(code)}\)\. Pass a directory on a file system with file locks"
    )
    with pytest.raises(StoreError, match=refusal):
        run(tmp_path, length=30)
    assert closed
    monkeypatch.undo()
    assert run(tmp_path, length=30)  # the refused run left no lock


def test_a_lock_is_free_again_after_the_run_on_windows(tmp_path, windows_locks):
    run(tmp_path, length=30)
    windows_locks.locked, windows_locks.owned = set(), set()  # as the system does when the handle is closed
    assert run(tmp_path, length=30).ids == list(range(30))


class BusyFiles:
    """``os.replace`` of Windows: refuses to replace or rename a file that is in use, for so many calls."""

    def __init__(self, monkeypatch, name, refusals):
        self.name, self.refusals, self.calls = name, refusals, 0
        self._replace = os.replace
        monkeypatch.setattr(convtap._atomic_write, "_IS_WINDOWS", True)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(convtap._atomic_write.time, "sleep", lambda seconds: None)

    def replace(self, old, new):
        if self.name in (Path(old).name, Path(new).name):
            self.calls += 1
            if self.calls <= self.refusals:
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(new))
        self._replace(old, new)


def test_a_file_that_is_read_for_a_moment_is_replaced_after_it(tmp_path, monkeypatch):
    file = tmp_path / "note.json"
    file.write_text("old")
    busy = BusyFiles(monkeypatch, "note.json", refusals=2)
    write_whole(file, lambda temporary: temporary.write_text("new"))
    assert (file.read_text(), busy.calls) == ("new", 3)
    assert os.listdir(tmp_path) == ["note.json"]


def test_a_capture_that_is_still_mapped_cannot_be_replaced_and_the_message_says_why(tmp_path, monkeypatch):
    net = model()
    with capture(net) as acts:
        net(torch.zeros(1, 1, 20))
    acts.save(tmp_path / "acts.safetensors")
    BusyFiles(monkeypatch, "acts.safetensors", refusals=99)
    with pytest.raises(
        StoreError, match=r"cannot be written.*cannot access.*writable folder and close programs that read the file\."
    ):
        acts.save(tmp_path / "acts.safetensors")
    assert os.listdir(tmp_path) == ["acts.safetensors"]


def test_a_bad_shard_that_a_reader_has_mapped_is_not_left_in_the_store_silently(tmp_path, monkeypatch):
    run(tmp_path, length=30)
    shard = min(tmp_path.glob("rank-*/shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    BusyFiles(monkeypatch, shard.name, refusals=99)
    with pytest.raises(StoreError, match=r"is damaged and cannot be set aside: .*\. Close the stores that read it"):
        run(tmp_path, length=30)


def test_content_is_forced_out_of_the_drives_memory_on_macos(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda handle, command: calls.append(command))
    monkeypatch.setitem(sys.modules, "fcntl", fake)
    write_whole(tmp_path / "a", lambda temporary: temporary.write_text("a"))
    assert calls == [51, 51]  # the file, and the entry of the folder


@pytest.mark.parametrize("system", ["not macOS", "a file system that cannot do it"])
def test_content_is_forced_to_the_disk_by_fsync_elsewhere(system, tmp_path, monkeypatch):
    calls, fsync = [], os.fsync

    def fail(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    fake = types.SimpleNamespace(fcntl=fail, **({"F_FULLFSYNC": 51} if system != "not macOS" else {}))
    monkeypatch.setitem(sys.modules, "fcntl", fake)
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(handle) or fsync(handle))
    write_whole(tmp_path / "a", lambda temporary: temporary.write_text("a"))
    assert len(calls) == 2
