"""The simulations of the gate as a command, on models that are made up."""

import json
import math
import sys

import numpy as np
import pytest
from helpers import REPOSITORY, run
from scipy import stats

from vaeflow.registry.comparison import level_of_try


@pytest.fixture
def work(tmp_path):
    """What models say of images: as hard for all, and a little else for each."""
    random = np.random.default_rng(0)
    hardness = random.normal(-100, 30, 3000)
    for kind, deviation in (("mnist", 5.0), ("sample", 0.5)):
        for seed in range(5):
            bound = hardness + random.normal(0, deviation / math.sqrt(2), 3000)
            np.savez(tmp_path / f"{kind}-{seed}.npz", bound=bound)
    return tmp_path


def test_years_of_the_gate_and_what_it_can_see(work):
    command = [sys.executable, "benchmarks/decisions.py", "gate", "--work", str(work)]
    run(REPOSITORY, *command, "--years", "20", "--results", str(work / "results.json"))
    found = json.loads((work / "results.json").read_text())["gate"]
    assert len(found["years"]) == 4
    for years in found["years"]:
        # Of 365 nights 2.3 % are beyond two standard errors by chance: 8 a year.
        assert years["two_standard_errors"]["false_promotions_a_year"] == pytest.approx(8, abs=3)
        assert years["share_with_a_false_promotion"] <= 0.1  # 0.5 % in expectation: 2 of 20 at most
    for gain, images in found["images_for_a_gain"]["mnist"]["try 1"].items():
        # A normal's quantiles will do, but for few images.
        quantiles = stats.norm.isf(level_of_try(1, 0.01)) + stats.norm.ppf(0.9)
        expected = (quantiles * 5.0 / float(gain.split()[0])) ** 2
        assert images == pytest.approx(expected, rel=0.15)
    assert found["smallest_gain"]["mnist, 2000 images, try 1"] == pytest.approx(
        10 * found["smallest_gain"]["sample, 3000 images, try 1"] * math.sqrt(1.5), rel=0.1
    )
    assert found["checked"]["2000 images"] == pytest.approx(0.9, abs=0.03)
