"""The measure by itself: what it vouches for, and the mathematics below it."""

import io

import numpy as np
import pytest
from scipy import stats

from vaeflow.bundle.anomaly import Calibration, Measure, fit
from vaeflow.bundle.statistics import (
    Latents,
    Look,
    integral,
    statistics,
    whitening,
    window_means,
)

SHAPE = (9, 8, 2)


def images_and_look(count: int, rng: np.random.Generator, latent_dim: int = 3):
    """Images that come from one distribution, and what some model may make of them."""
    brightness = rng.uniform(0.2, 0.8, (count, 1, 1, 1))
    images = np.clip(brightness + 0.1 * rng.standard_normal((count, *SHAPE)), 0, 1)
    images = images.astype(np.float32)
    means = (3 * brightness[:, 0, 0] + rng.standard_normal((count, latent_dim))).astype(np.float32)
    look = Look(
        means,
        rng.normal(-1, 0.1, (count, latent_dim)).astype(np.float32),
        np.square(means).sum(axis=1),
        rng.gamma(2, 1, (count, *SHAPE[:2])).astype(np.float32),
        np.broadcast_to(brightness, images.shape).astype(np.float32),
    )
    return images, look


def some(images, look, rows):
    return images[rows], Look(*(values[rows] for values in look))


def fitted(count: int, seed: int = 0, latent_dim: int = 3) -> Measure:
    rng = np.random.default_rng(seed)
    parts = [images_and_look(many, rng, latent_dim) for many in (count, count // 3)]
    measure = fit(*parts[0], *parts[1], seed)
    held_back = measure.anomaly(*images_and_look(count, rng, latent_dim))
    return measure._replace(calibration=Calibration.by(held_back))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_as_many_alarms_as_promised_over_many_splits(rate):
    """Exchangeable images: those that are judged come as those that calibrated."""
    rng = np.random.default_rng(1)
    measure = fitted(40)
    images, look = images_and_look(4_000, rng)
    pool = measure.anomaly(images, look)
    splits, calibrating = 1_000, 150
    flagged = np.empty(splits)
    for split in range(splits):
        order = rng.permutation(len(pool))
        usual, new = pool[order[:calibrating]], pool[order[calibrating : calibrating + 200]]
        again = Calibration.by(usual)
        alarms = new > again.threshold(rate)
        np.testing.assert_array_equal(alarms, again.p_value(new) <= rate)
        flagged[split] = alarms.mean()
    error = flagged.std(ddof=1) / np.sqrt(splits)
    assert flagged.mean() <= rate + 2 * error
    # And not far fewer than that, or the promise would be cheap.
    assert flagged.mean() >= rate - 1 / (calibrating + 1) - 2 * error


def test_new_images_are_usual_though_the_model_knows_its_own_by_heart():
    """It has the brightness of training images to a hair, and errs a bit on all others."""
    rng = np.random.default_rng(8)
    known, *apart = (images_and_look(count, rng) for count in (400, 80, 400))
    others, new = (
        (images, look._replace(reconstruction=look.reconstruction + error))
        for images, look in apart
        for error in [rng.normal(0, 0.1, (len(images), 1, 1, 1)).astype(np.float32)]
    )
    usual = fit(*known, *others, 0).anomaly(*new)
    assert 0.7 < np.median(usual) < 1.3
    assert np.quantile(usual, 0.99) < 8
    by_known_ones = fit(*known, *known, 0).anomaly(*new)
    assert np.quantile(by_known_ones, 0.99) > 15  # behind which all that is odd would hide


def test_a_p_value_counts_those_that_are_as_unusual():
    four = Calibration.by(np.float32([2, 3, 1, 2]))
    assert four.p_value(np.float32([0, 1, 2, 2.5, 3, 4])).tolist() == [1, 1, 0.8, 0.4, 0.4, 0.2]
    assert four.smallest_rate() == 0.2
    assert four.threshold(0.2) == 3
    assert four.threshold(0.4) == 2
    with pytest.raises(ValueError, match=r"4 images cannot vouch .* 0\.1; the smallest .* is 0\.2"):
        four.threshold(0.1)


def test_both_too_much_and_too_little_is_unusual():
    rng = np.random.default_rng(3)
    measure = fitted(400)
    images, look = images_and_look(200, rng)
    usual = measure.anomaly(images, look)
    assert 0.7 < np.median(usual) < 1.5
    changes = {
        "flat": (np.full_like(images, 0.5), look),
        "rougher": (np.clip(images + 0.3 * rng.standard_normal(images.shape), 0, 1), look),
        "smoother": (0.5 * images + 0.5 * look.reconstruction, look),
        "surprising": (images, look._replace(surprise=3 * look.surprise)),
        "too expected": (images, look._replace(surprise=0.2 * look.surprise)),
        "latent away": (images, look._replace(means=look.means + 6)),
    }
    for what, (changed, seen) in changes.items():
        odd = measure.anomaly(changed.astype(np.float32), seen)
        assert measure.calibration.p_value(odd).max() < 0.1, what


def test_the_mixture_of_latents_is_a_density():
    """Against SciPy's normal density, and as a whole by quadrature."""
    rng = np.random.default_rng(4)
    one = rng.multivariate_normal([1, -1], [[2, 0.6], [0.6, 0.5]], 400)
    single = Latents.of(one[:15], 0)  # so few are one component
    assert len(single.constants) == 1
    covariance = np.linalg.inv(single.whitenings[0] @ single.whitenings[0].T)
    expected = stats.multivariate_normal(single.centres[0], covariance).logpdf(one)
    # The whitening that goes before adds a constant.
    difference = -single.surprise(one) - expected
    np.testing.assert_allclose(difference, difference[0], atol=1e-6)

    two = np.concatenate([one, rng.normal([12, 8], 0.7, (400, 2))])
    mixed = Latents.of(two, 0)
    assert len(mixed.constants) == 10
    axis = np.linspace(-15, 25, 801)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    density = np.exp(-mixed.surprise(grid)).reshape(801, 801)
    whole = np.trapezoid(np.trapezoid(density, axis), axis)
    scale = abs(np.linalg.det(whitening(two)))
    assert whole * scale == pytest.approx(1, abs=1e-3)
    # Between the two there is nothing, though it is the middle of all.
    assert mixed.surprise(two.mean(axis=0)[None]) > mixed.surprise(two).max()


def test_window_means_are_means_over_windows():
    values = np.random.default_rng(5).normal(size=(2, 3, 7, 6))
    means = window_means(integral(values), 3)
    windows = np.lib.stride_tricks.sliding_window_view(values, (3, 3), axis=(-2, -1))
    np.testing.assert_allclose(means, windows.mean(axis=(-2, -1)), atol=1e-9)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 5, 1), (2, 2, 3), (3, 3, 1), (28, 28, 1), (8, 9, 4)]
)
def test_images_of_any_size_are_described(shape):
    rng = np.random.default_rng(6)
    images = rng.random((30, *shape), dtype=np.float32)
    look = Look(
        *rng.normal(size=(2, 30, 2)).astype(np.float32),
        rng.random(30, dtype=np.float32),
        rng.random((30, *shape[:2]), dtype=np.float32),
        rng.random((30, *shape), dtype=np.float32),
    )
    measure = fit(images, look, images, look, 0)
    found = measure.anomaly(images, look)
    assert np.isfinite(found).all()
    assert measure.map(images, look).shape == (30, *shape[:2])
    black = np.zeros_like(images)
    described = statistics(black, look, measure.places, measure.latents)
    assert np.isfinite(described).all()


@pytest.mark.parametrize("pictures", [None, Calibration(np.float32([1, 2, 3]))])
def test_a_measure_is_read_as_it_was_written(tmp_path, pictures):
    measure = fitted(40)._replace(pictures=pictures)
    path = tmp_path / "anomaly.npz"
    measure.save(path)
    content = path.read_bytes()
    read = Measure.load(io.BytesIO(content), SHAPE, 3)
    images, look = images_and_look(20, np.random.default_rng(7))
    np.testing.assert_array_equal(read.anomaly(images, look), measure.anomaly(images, look))
    np.testing.assert_array_equal(read.calibration.anomalies, measure.calibration.anomalies)
    assert (read.pictures is None) == (pictures is None)
    if pictures is not None:
        np.testing.assert_array_equal(read.pictures.anomalies, pictures.anomalies)
    for shape, latent_dim in (((8, 8, 2), 3), (SHAPE, 4)):
        with pytest.raises(ValueError, match=r"has the shape"):
            Measure.load(io.BytesIO(content), shape, latent_dim)
    with np.load(path) as arrays:
        parts = dict(arrays)
    for name in set(parts) - {"pictures"}:
        lacking = {key: values for key, values in parts.items() if key != name}
        np.savez(path, **lacking)
        with pytest.raises(ValueError, match=f"it has no {name}"):
            Measure.load(io.BytesIO(path.read_bytes()), SHAPE, 3)
    np.savez(path, **{**parts, "calibration": np.empty(0, np.float32)})
    with pytest.raises(ValueError, match="calibration has the shape"):
        Measure.load(io.BytesIO(path.read_bytes()), SHAPE, 3)
