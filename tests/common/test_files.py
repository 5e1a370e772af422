import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vaeflow.common import files
from vaeflow.common.files import atomic_directory, atomic_file, cache_folder


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


# Writes a target and ends itself the hard way at the n-th call of the system.
KILLED = """
import os, signal, sys
from pathlib import Path
from vaeflow.common import files

kind, target, step, swap = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
if not swap:
    files._exchange = lambda one, other: False
left = step

def count(frame, event, call):
    global left
    if event == "c_call" and call.__module__ in ("posix", "fcntl"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(count)
with getattr(files, kind)(target) as fresh:
    sys.setprofile(None)
    if kind == "atomic_directory":
        fresh = fresh / "a"
    fresh.write_text("new")
    sys.setprofile(count)
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


TRACED = """
import sys
from pathlib import Path
from vaeflow.common.files import atomic_directory, atomic_file, cache_folder

folder = Path(sys.argv[1], "deep", "folder")
for _ in range(2):
    with atomic_directory(folder / "target") as fresh:
        (fresh / "a").touch()
with atomic_file(folder / "file") as fresh:
    fresh.touch()
"""


def test_the_system_is_told_to_write_before_and_after_a_name_changes(tmp_path):
    if (
        shutil.which("strace") is None
        or subprocess.run(["strace", "-o", os.devnull, "true"]).returncode
    ):
        pytest.skip("strace, which shows the calls of the system, is missing or not allowed")
    log = tmp_path / "calls"
    command = ["strace", "-f", "-y", "-o", log, "-e", "trace=fsync,rename,renameat,renameat2"]
    subprocess.run([*command, sys.executable, "-c", TRACED, tmp_path], check=True)
    calls = []
    for line in log.read_text().splitlines():
        if " = 0" in line and str(tmp_path) in line:
            call = re.search(r"\w+(?=\()", line)[0][:6]
            calls.append((call, re.findall(r'/([^/<>"]+)[">]', line.replace("AT_FDCWD<", ""))[-1]))
    folder, swap = [("fsync", "a"), ("fsync", "new")], [("rename", "target"), ("fsync", "folder")]
    made = [("fsync", "deep"), ("fsync", tmp_path.name)]
    file = [("fsync", "file"), ("rename", "file"), ("fsync", "folder")]
    assert calls == made + (folder + swap) * 2 + file


def test_a_file_system_that_cannot_be_told_to_write_is_no_error():
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc, which is such a file system")
    files._sync(Path("/proc"))


def test_what_was_replaced_does_not_come_back_in_part(tmp_path):
    target = tmp_path / "target"
    for step in range(100):
        with atomic_directory(target) as fresh:
            (fresh / "a").write_text("old")
            (fresh / "b").write_text("old")
        command = [sys.executable, "-c", KILLED, "atomic_directory", target, str(step), "False"]
        if subprocess.run(command).returncode == 0:
            break
        if target.exists() and not (target / "b").exists():
            shutil.rmtree(target)  # as DVC does before a stage
            with pytest.raises(KeyError), atomic_directory(target):
                raise KeyError
            assert list(tmp_path.iterdir()) == []
    assert 10 < step < 99


def test_half_a_file_is_not_taken_for_what_was_there_before(tmp_path):
    child = """if True:
        import os, signal, sys
        from pathlib import Path
        from vaeflow.common.files import atomic_file
        with atomic_file(Path(sys.argv[1])) as fresh:
            fresh.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for name in ("old", "new"):
        subprocess.run([sys.executable, "-c", child, tmp_path / name])
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(KeyError), atomic_file(tmp_path / name):
            raise KeyError
        assert list(tmp_path.iterdir()) == []


def test_folders_of_others_beside_the_target_stay(tmp_path):
    (tmp_path / ".target-original").mkdir()
    make(tmp_path / "target", "one")
    assert (tmp_path / ".target-original").exists()


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


def test_the_cache_is_its_owners(tmp_path, monkeypatch):
    """Whatever the umask: what others could write there would be loaded here."""
    before = os.umask(0)
    try:
        monkeypatch.setenv("VAEFLOW_CACHE", str(tmp_path / "cache"))
        assert cache_folder().stat().st_mode & 0o777 == 0o700
        (tmp_path / "open").mkdir()
        monkeypatch.setenv("VAEFLOW_CACHE", str(tmp_path / "open"))
        assert cache_folder().stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_an_empty_cache_variable_is_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VAEFLOW_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vaeflow"
