import pytest

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
    with pytest.raises(KeyError), atomic_directory(target) as fresh:
        (fresh / "a").write_text("three")
        raise KeyError
    assert (target / "a").read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupt_between_the_two_renames_keeps_the_old_folder(tmp_path, monkeypatch):
    from pathlib import Path

    target = tmp_path / "target"
    make(target, "one")
    rename = Path.rename

    def interrupted(path, to):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(target, "two")
    assert (target / "a").read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "out" / "a.txt"
    with pytest.raises(KeyError), atomic_file(target) as fresh:
        fresh.write_text("half")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with atomic_file(target) as fresh:
        fresh.write_text("whole")
    assert target.read_text() == "whole"
