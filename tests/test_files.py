import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vaeflow import files
from vaeflow.files import atomic_directory, atomic_file


def make(folder, text):
    with atomic_directory(folder) as fresh:
        (fresh / "a").write_text(text)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "target"
    make(target, "one")
    (target / "stale").touch()
    make(target, "two")
    assert [path.name for path in target.iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError), atomic_directory(target) as fresh:
        (fresh / "a").write_text("three")
        raise FileNotFoundError
    assert (target / "a").read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


# Ends itself the hard way at the n-th line that it comes to in files.py.
KILLED = """
import os, signal, sys
from pathlib import Path
from vaeflow import files

kind, target, step, swap = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
if not swap:
    files._exchange = lambda one, other: False
left = step

def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename != files.__file__:
        return None
    left -= event == "line"
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
with getattr(files, kind)(target) as fresh:
    sys.settrace(None)
    if kind == "atomic_directory":
        fresh = fresh / "a"
    fresh.write_text("new")
    sys.settrace(trace)
    sys._getframe().f_trace = trace
"""


@pytest.mark.parametrize(
    ("kind", "swap"),
    [("atomic_directory", True), ("atomic_directory", False), ("atomic_file", True)],
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, kind, swap):
    file = tmp_path / "target" / "a" if kind == "atomic_directory" else tmp_path / "target"
    steps, after = 0, []
    while True:
        with getattr(files, kind)(tmp_path / "target") as fresh:
            (fresh / "a" if kind == "atomic_directory" else fresh).write_text("old")
        assert list(tmp_path.iterdir()) == [tmp_path / "target"]  # nothing lies about
        command = [sys.executable, "-c", KILLED, kind, tmp_path / "target", str(steps), str(swap)]
        status = subprocess.run(command).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if not file.exists() and not swap:
            with pytest.raises(KeyError), getattr(files, kind)(tmp_path / "target"):
                raise KeyError  # the next call, even one that fails, puts the old one back
        after.append(file.read_text())
        steps += 1
    assert file.read_text() == "new"
    assert steps > 15
    assert after == sorted(after, reverse=True)
    assert set(after) == {"old", "new"}


def test_what_is_new_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    calls = []
    fsync, exchange, replace = os.fsync, files._exchange, Path.replace

    def recorded(handle):
        calls.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(files, "_exchange", lambda *two: calls.append("swap") or exchange(*two))
    monkeypatch.setattr(Path, "replace", lambda *two: calls.append("swap") or replace(*two))
    target = tmp_path / "target"
    make(target, "one")
    calls.clear()
    with atomic_directory(target) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "deep" / "a").touch()
    assert sorted(calls[:3]) == ["a", "deep", "new"]
    assert calls[3:] == ["swap", tmp_path.name]
    calls.clear()
    with atomic_file(tmp_path / "b") as fresh:
        fresh.touch()
    assert calls == ["b", "swap", tmp_path.name]


def test_two_at_once_do_not_tidy_each_other_up(tmp_path):
    with atomic_directory(tmp_path / "target") as first:
        make(tmp_path / "target", "second")
        (first / "a").write_text("first")
    assert (tmp_path / "target" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "out" / "a.txt"
    with pytest.raises(KeyError), atomic_file(target) as fresh:
        fresh.write_text("half")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with atomic_file(target) as fresh:
        fresh.write_text("whole")
    assert target.read_text() == "whole"
