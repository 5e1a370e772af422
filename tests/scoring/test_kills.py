"""Real batch runs, killed at random moments and started again."""

import signal
import subprocess
import time

import numpy as np
import pytest
from helpers import KILLS, SEED, run

IMAGES = 500_000  # more than can be scored between the kills


def kill_during(command, parts, delay) -> None:
    """Start a run, and kill it a moment after it has kept something new."""
    before = set(parts.glob("*.npy"))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not set(parts.glob("*.npy")) - before:
            assert process.poll() is None, "the run has ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.kills
def test_killed_at_random_moments_it_ends_with_the_same_bytes(finished, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    command = ["vaeflow", "score", str(tmp_path / "images.npy"), "--latents"]
    command += ["--model", str(finished / "outputs" / "bundle"), "--out"]
    straight, killed = tmp_path / "straight" / "s.parquet", tmp_path / "killed" / "s.parquet"
    start = time.monotonic()
    run(tmp_path, *command, str(straight))
    seconds = time.monotonic() - start

    random = np.random.default_rng(SEED)
    parts = killed.with_name(".s.parquet.parts")
    for _ in range(KILLS):
        delay = random.uniform(0, 0.03 * seconds)  # about as long as a shard takes
        print("killed after seconds", delay)  # shown when the test fails
        kill_during([*command, str(killed)], parts, delay)
        assert not killed.exists()
    done = run(tmp_path, *command, str(killed))

    assert "scored before by a run that did not end" in done.stdout
    assert killed.read_bytes() == straight.read_bytes()
    assert list(killed.parent.iterdir()) == [killed]
