import json
import shutil

import numpy as np
import pytest
from helpers import arrow_memory, change_parameters, run
from scipy import spatial, stats

from vaeflow.bundle.manifest import MANIFEST, REFERENCE, Reference, read_reference
from vaeflow.bundle.runtime import Bundle
from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Drift
from vaeflow.data.splits import load_split
from vaeflow.errors import BundleError, DataError, VaeflowError
from vaeflow.scoring.drift import (
    Sample,
    maximum_mean_discrepancy,
    measure_drift,
    read_sample,
    run_tests,
)
from vaeflow.scoring.outputs import ParquetTable
from vaeflow.scoring.score import Batch, score

ANY_DISTANCE = Drift(smallest_distance=0.0)


def normal(random, count, latent_dim=6):
    """Latents that depend on each other, and a score that depends on them."""
    means = random.normal(size=(count, latent_dim))
    means[:, 1] += means[:, 0]
    return means, np.square(means).sum(axis=1)


def compared(reference, batch, thresholds=ANY_DISTANCE):
    return run_tests(Reference(*reference), Sample(*batch, len(batch[1]), {}), thresholds)


def drifted(comparison):
    return {marginal.name for marginal in comparison.marginals if marginal.drifted}


def test_distances_and_p_values_are_those_of_their_definitions():
    random = np.random.default_rng(0)
    reference, batch = normal(random, 90), normal(random, 70)
    batch[0][:, 2] += 0.4
    comparison = compared(reference, batch)
    columns = zip(
        np.column_stack([reference[1], reference[0]]).T,
        np.column_stack([batch[1], batch[0]]).T,
        strict=True,
    )
    for marginal, (theirs, ours) in zip(comparison.marginals, columns, strict=True):
        both = np.concatenate([theirs, ours])
        below = [np.mean(values[:, None] <= both, axis=0) for values in (theirs, ours)]
        assert marginal.distance == pytest.approx(np.abs(below[0] - below[1]).max())
        # Under exchanges of which sample a number belongs to.
        order = np.argsort(both)
        steps = np.where(order < len(theirs), 1 / len(theirs), -1 / len(ours))
        walks = np.cumsum(random.permuted(np.tile(steps, (4000, 1)), axis=1), axis=1)
        p_value = np.mean(np.abs(walks).max(axis=1) >= marginal.distance - 1e-9)
        assert marginal.p_value == pytest.approx(p_value, abs=0.06)

    # Holm 1979: the smallest of m p-values counts up to level / m, the next up to level / (m - 1),
    # and so on until one does not.
    p_values = np.sort([marginal.p_value for marginal in comparison.marginals])
    for level in (1e-4, 1e-3, 0.01, 0.1, 0.5):
        counting = np.cumprod(p_values <= level / np.arange(7, 0, -1)).sum()
        adjusted = np.sort([marginal.adjusted_p_value for marginal in comparison.marginals])
        assert np.count_nonzero(adjusted <= level) == counting
    level = ANY_DISTANCE.false_alarms / 2
    for marginal in comparison.marginals:
        assert marginal.drifted == (marginal.adjusted_p_value <= level)


def test_the_discrepancy_is_that_of_its_definition():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(30, 3)), random.normal(1.0, size=(20, 3))
    found = maximum_mean_discrepancy(first, second, 9, random)
    both = np.concatenate([first, second])
    assert found.bandwidth == pytest.approx(np.median(spatial.distance.pdist(both)))

    def mean_kernel(a, b, bandwidth=found.bandwidth):
        squares = spatial.distance.cdist(a, b, "sqeuclidean")
        return np.exp(-squares / (2 * bandwidth**2)).mean()

    within = mean_kernel(first, first) + mean_kernel(second, second)
    assert found.squared == pytest.approx(within - 2 * mean_kernel(first, second))
    assert len(found.permuted) == 9
    # Of different points only, which takes off what chance adds; by the measure of the second.
    own = np.median(spatial.distance.pdist(second))
    pairs = [
        (mean_kernel(points, points, own) * len(points) - 1) / (len(points) - 1)
        for points in (first, second)
    ]
    share = 1 - 2 * mean_kernel(first, second, own) / sum(pairs)
    assert found.distance == pytest.approx(np.sqrt(share))


@pytest.mark.parametrize("latent_dim", [2, 8, 32])
def test_the_distance_says_by_how_much_all_latents_have_shifted(latent_dim):
    """About half a standard deviation of it, however many there are; 1 for nothing in common."""
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 1000, latent_dim))
    for shift, distance in ((0.0, 0.0), (0.2, 0.1), (0.4, 0.2), (100.0, 1.0)):
        found = maximum_mean_discrepancy(first, second + shift, 1, random)
        assert found.distance == pytest.approx(distance, abs=0.04)


def test_the_discrepancys_p_value_is_uniform_without_drift():
    random = np.random.default_rng(0)
    p_values = [
        maximum_mean_discrepancy(
            random.normal(size=(30, 2)), random.normal(size=(20, 2)), 199, random
        ).p_value
        for _ in range(400)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_points_that_are_all_the_same_do_not_differ():
    found = maximum_mean_discrepancy(np.ones((9, 2)), np.ones((5, 2)), 19, np.random.default_rng(0))
    assert found.squared == pytest.approx(0, abs=1e-12)
    assert found.bandwidth == 1


def test_false_alarms_are_as_rare_as_the_thresholds_say():
    """By significance alone, without the floor, which makes them rarer still."""
    random = np.random.default_rng(0)
    thresholds = Drift(smallest_distance=0.0, false_alarms=0.2)
    batches, alarms = 150, {"marginals": 0, "discrepancy": 0}
    for _ in range(batches):
        found = compared(normal(random, 200), normal(random, 150), thresholds)
        alarms["marginals"] += bool(drifted(found))
        alarms["discrepancy"] += found.discrepancy_drifted
    for count in alarms.values():
        assert stats.binomtest(count, batches, 0.1, "greater").pvalue > 0.001
    assert alarms["discrepancy"] > 0  # the test can see them


def test_a_shift_is_found_and_named():
    random = np.random.default_rng(0)
    found = 0
    for _ in range(20):
        reference, batch = normal(random, 500), normal(random, 300)
        batch[0][:, 3] += 0.6
        comparison = compared(reference, batch, Drift())
        assert comparison.drifted
        found += drifted(comparison) == {"mean_3"}
    assert found >= 18


def test_a_change_of_dependence_alone_is_found_by_the_discrepancy():
    random = np.random.default_rng(0)
    reference = random.normal(size=(500, 2))
    batch = random.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 500)
    scores = random.normal(size=(2, 500))
    comparison = compared((reference, scores[0]), (batch, scores[1]))
    assert not drifted(comparison)
    assert comparison.discrepancy_drifted


def test_a_difference_too_small_to_matter_is_no_drift_however_sure():
    random = np.random.default_rng(0)
    reference, batch = normal(random, 5000), normal(random, 5000)
    batch[0][:, 3] += 0.15
    assert drifted(compared(reference, batch)) == {"mean_3"}
    assert not compared(reference, batch, Drift()).drifted


def test_a_small_shift_of_every_latent_is_no_drift_however_sure():
    random = np.random.default_rng(0)
    for _ in range(3):
        reference = random.normal(size=(5000, 8)), random.normal(size=5000)
        batch = random.normal(0.15, size=(5000, 8)), random.normal(size=5000)
        assert compared(reference, batch).discrepancy_drifted  # it is sure
        assert not compared(reference, batch, Drift()).drifted
        larger = batch[0] + 0.25, batch[1]
        assert compared(reference, larger, Drift()).discrepancy_drifted


@pytest.fixture
def model(finished):
    return finished / "outputs" / "bundle"


@pytest.fixture
def scored(model, tmp_path):
    """A function from images to the table of their scores."""

    def scored(name, images):
        np.save(tmp_path / f"{name}.npy", images)
        table = tmp_path / f"{name}.parquet"
        score(Batch((str(tmp_path / f"{name}.npy"),), str(model), table, latents=True))
        return table

    return scored


@pytest.mark.slow
def test_the_reference_is_what_the_bundle_answers_on_validation_images(finished, model):
    bundle = Bundle(model)
    reference = read_reference(model, bundle.manifest)
    images = load_split(Workspace(finished).prepared, "validation")
    np.testing.assert_allclose(reference.means, bundle.encode(images).mean, atol=1e-4)
    np.testing.assert_allclose(reference.scores, bundle.score(images), rtol=1e-4)


@pytest.mark.slow
def test_test_images_do_not_drift_and_inverted_ones_do(finished, model, scored, tmp_path):
    images = np.asarray(load_split(Workspace(finished).prepared, "test"))
    usual = measure_drift(scored("usual", images), str(model), tmp_path / "u.json", Drift())
    assert not usual["drifted"]
    other = measure_drift(scored("other", 255 - images), str(model), tmp_path / "o.json", Drift())
    assert other["drifted"]
    assert json.loads((tmp_path / "o.json").read_text()) == other
    assert other["images"] == other["images_compared"] == len(images)
    assert other["marginals"][0]["name"] == "score"
    assert other["model_name"] == "digits-vae"
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_rows_of_a_table_are_sampled(scored, digits):
    table = scored("digits", digits)
    whole = read_sample(table, 5000, 8)
    assert len(whole.scores) == whole.rows == 1797
    part = read_sample(table, 100, 8)
    assert part.means.shape == (100, 8)
    assert part.rows == 1797
    rows = {tuple(row) for row in np.column_stack([whole.scores, whole.means])}
    assert {tuple(row) for row in np.column_stack([part.scores, part.means])} <= rows


def test_a_large_table_is_sampled_in_little_memory(tmp_path):
    path, random = tmp_path / "scores.parquet", np.random.default_rng(0)
    written = ParquetTable(path, {"bundle_sha256": "any"})
    rows = random.standard_normal((300_000, 9), np.float32)
    rows[:, 0] = np.arange(len(rows))
    columns = ["score", *(f"mean_{unit}" for unit in range(8))]
    written.write({name: rows[:, column] for column, name in enumerate(columns)})
    written.close()
    with arrow_memory() as pool:
        sample = read_sample(path, 400, 8)
    assert pool.max_memory() < path.stat().st_size / 4
    assert sample.rows == 300_000
    place = {row[0]: row for row in rows}
    found = np.column_stack([sample.scores, sample.means])
    assert len({row[0] for row in found}) == 400
    for row in found:
        np.testing.assert_array_equal(row, place[row[0]])


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(bundle, model, scored, digits, tmp_path):
    table = scored("some", digits[:50])
    out, thresholds = tmp_path / "d.json", Drift()
    score(Batch(("digits",), str(model), tmp_path / "plain.parquet"))
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    for name, expected in (
        ("plain.parquet", r"mean_0.* missing.*--latents"),
        ("junk.parquet", "not a readable Parquet"),
        ("absent.parquet", "no such file"),
    ):
        with pytest.raises(DataError, match=expected):
            measure_drift(tmp_path / name, str(model), out, thresholds)
    with pytest.raises(VaeflowError, match=r"expected \.json"):
        measure_drift(table, str(model), tmp_path / "d.txt", thresholds)

    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**content, "name": "other"}))
    with pytest.raises(DataError, match="was scored by digits-vae version"):
        measure_drift(table, str(bundle), out, thresholds)
    (bundle / REFERENCE).unlink()
    del content["files"][REFERENCE]
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"no reference\.npz.*Export it again"):
        measure_drift(table, str(bundle), out, thresholds)
    assert not out.exists()


@pytest.mark.slow
def test_the_command_obeys_params_yaml_and_exits_with_1_on_drift(
    finished, model, scored, digits, tmp_path
):
    root = tmp_path / "workspace"
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(finished / name, root)
    table = scored("darker", digits[:300] // 3)
    command = ["vaeflow", "drift", str(table), "--model", str(model), "--out", "drift.json"]
    done = run(root, *command, status=1)
    assert "drift: yes, 300 of 300 images" in done.stdout
    assert "vaeflow.drift.detected: no server" in done.stdout
    assert (root / "drift.png").exists()

    change_parameters(root, drift={"smallest_distance": 0.99, "images": 99})
    done = run(root, *command)
    assert "drift: no, 99 of 300 images" in done.stdout
