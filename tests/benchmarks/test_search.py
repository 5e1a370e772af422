"""The search as a command, on trials of seconds."""

import json
import sys

import pytest
from helpers import REPOSITORY, run

SEARCH = REPOSITORY / "benchmarks" / "search.py"


@pytest.mark.slow
def test_two_at_once_and_only_what_is_not_there(tmp_path, monkeypatch):
    """None is lost that ends beside another; all are ranked, the best first."""
    monkeypatch.syspath_prepend(SEARCH.parent)
    from search import OF_AUTO

    *before, _, _ = OF_AUTO
    kept = [
        {"set": "digits", "changes": changes, "rung": 1, "epochs": 1, "bound": -1.0 - number}
        for number, changes in enumerate(before)
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(kept))
    command = ["digits", "--rungs", "1", "--jobs", "2", "--results", results]
    done = run(tmp_path, sys.executable, SEARCH, *command)
    trials = json.loads(results.read_text())
    assert trials[:-2] == kept
    half, deep = sorted(trials[-2:], key=lambda trial: OF_AUTO.index(trial["changes"]))
    assert [half["changes"], deep["changes"]] == [{"batch_size": 0.5}, {"depth": 2}]
    assert (half["settings"]["batch_size"], half["settings"]["depth"]) == (16, 1)
    assert (deep["settings"]["batch_size"], deep["settings"]["depth"]) == (32, 2)
    assert half["elbo"] <= half["bound"] < 0
    ranked = [line for line in done.stdout.splitlines() if line.startswith("digits, 1 epochs")]
    assert len(ranked) == len(OF_AUTO)
    assert ranked[0] == "digits, 1 epochs: -1.0 {}"


def test_what_the_trials_change_goes_on_whatever_it_was(tmp_path, monkeypatch):
    """The best are compared with it after as many epochs."""
    monkeypatch.syspath_prepend(SEARCH.parent)
    from search import OF_AUTO

    first = [
        {"set": "digits", "changes": changes, "rung": 1, "epochs": 1, "bound": float(number)}
        for number, changes in enumerate(OF_AUTO)
    ]
    second = [first[0] | {"rung": 2, "epochs": 2}, first[-1] | {"rung": 2, "epochs": 2}]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(first + second))
    command = ["digits", "--rungs", "1", "2", "--keep", "8", "--results", results]
    done = run(tmp_path, sys.executable, SEARCH, *command)
    ranked = [line for line in done.stdout.splitlines() if line.startswith("digits, 2 epochs")]
    assert ranked == ["digits, 2 epochs: 7.0 {'depth': 2}", "digits, 2 epochs: 0.0 {}"]
