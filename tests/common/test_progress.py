from helpers import Terminal

from vaeflow.common.progress import Progress


def test_a_log_gets_a_line_now_and_then(clock, capsys):
    with Progress("bounds", 100) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.advance(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bounds  15%, 1:25 left"
    assert len(lines) == 6


def test_what_is_done_at_once_says_nothing(capsys):
    with Progress("bounds", 10) as bar:
        bar.advance(10)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_line_that_is_wiped_at_the_end(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with Progress("bounds", 4) as bar:
        bar.advance(0)
        clock[0] += 30
        bar.advance(1)
    written = terminal.getvalue()
    assert "[######                  ] bounds  25%, 1:30 left" in written
    assert written.endswith("\r\033[K")
    assert "\n" not in written


def test_rate_and_time_left_are_those_of_what_was_done_here(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with Progress("epoch 3/4", 4000, done=2000, unit="images") as bar:
        clock[0] += 500  # compiling
        bar.advance(0)
        clock[0] += 10
        bar.advance(1000, lambda: "elbo -23.10")
    written = terminal.getvalue()
    assert "] epoch 3/4  75%, 0:10 left, 100 images/s, elbo -23.10" in written


def test_without_lines_a_log_gets_nothing(clock, capsys):
    with Progress("epoch", 100, lines=False) as bar:
        clock[0] += 1000
        bar.advance(1)
        bar.wipe()
    assert capsys.readouterr().out == ""


def test_nothing_done_and_no_time_between_two_readings_of_the_clock_show_nothing(clock, capsys):
    with Progress("bounds", 100) as bar:
        clock[0] += 1000
        for amount in (0, 10, 0):  # all at one time
            bar.advance(amount)
        assert capsys.readouterr().out == ""
        clock[0] += 10
        bar.advance(0)
    assert capsys.readouterr().out == "bounds  10%, 1:30 left\n"
