"""The search as a command, on a trial of seconds."""

import json
import sys

from helpers import REPOSITORY, run


def test_a_trial_says_what_was_chosen_and_reached(tmp_path):
    """In a process of its own, as the search makes each."""
    trial = {"set": "digits", "changes": {"latent_dim": 0.5, "filters": 2}, "rung": 1}
    script = REPOSITORY / "benchmarks" / "search.py"
    done = run(tmp_path, sys.executable, script, "digits", "--trial", json.dumps(trial))
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["epochs"], found["images"]) == (1, 360)
    assert found["settings"]["latent_dim"] == 8
    assert found["settings"]["filters"] == [64, 128]
    assert found["elbo"] <= found["bound"] < 0
