import os
import subprocess
import sys

from helpers import Terminal

from vaeflow.common.progress import BAR
from vaeflow.orchestration import console


def stage(clock, lines):
    """A stage that prints a line a second; returns what was logged."""
    logged = []
    with console.stage("train", logged.append) as shown:
        for line in lines:
            clock[0] += 1
            if shown.heard(line):
                logged.append(line)
    return logged


LINES = [f"{BAR}[##] epoch {n}/20" for n in range(1, 21)] + [
    "I0000 oneDNN custom operations are on",
    "warning: grey pixels",
    "20 epochs",
    "",
]


def test_a_log_file_gets_what_is_logged_and_a_person_what_matters(tmp_path, clock, capfd):
    with console.open_console(tmp_path, "retrain", verbose=False) as shown:
        os.write(2, b"a library's remark\n")
        subprocess.run([sys.executable, "-c", "import sys; print('a child', file=sys.stderr)"])
        logged = stage(clock, LINES)
    os.write(2, b"afterwards\n")
    out, err = capfd.readouterr()
    assert err == "afterwards\n"
    assert shown.log.read_text() == "a library's remark\na child\n"
    assert logged == ["train begins", *LINES[-4:], "train      20 epochs (24.0 s)"]
    first, *bars, warning, last = out.splitlines()
    assert first == "train      begins"
    assert len(bars) == 4  # one in five seconds
    assert bars[0] == "train      [##] epoch 1/20"
    assert warning == "train      warning: grey pixels"
    assert last == "train      20 epochs (24.0 s)"


def test_a_terminal_has_one_line_that_changes(tmp_path, clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    with console.open_console(tmp_path, "retrain", verbose=False):
        stage(clock, LINES)
    written = terminal.getvalue()
    assert written.count("\n") == 2  # the warning, and the end
    assert "\r\033[Ktrain      [##] epo" in written
    assert "[##] epoc" not in written  # more would wrap
    assert written.endswith("train      20 epochs (24.0 s)\n\r\033[K")


def test_with_everything_shown_there_is_no_file_and_nothing_twice(tmp_path, clock, capfd):
    with console.open_console(tmp_path, "retrain", verbose=True) as shown:
        stage(clock, LINES)
        os.write(2, b"a library's remark\n")
    assert shown.log is None
    assert capfd.readouterr() == ("", "a library's remark\n")
    assert list(tmp_path.iterdir()) == []


def test_the_newest_logs_are_kept(tmp_path):
    for number in range(30):
        (tmp_path / f"retrain-20250101-0000{number:02}.log").touch()
    (tmp_path / "other.log").touch()
    with console.open_console(tmp_path, "retrain", verbose=False) as shown:
        pass
    kept = sorted(tmp_path.glob("retrain-*.log"))
    assert len(kept) == console.KEPT_LOGS
    assert kept[0].name.endswith("11.log")
    assert shown.log in kept or not shown.log.exists()
    assert (tmp_path / "other.log").exists()
