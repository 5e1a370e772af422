"""How often the gate and the drift test err, and what they can see.

    python benchmarks/decisions.py [models] [gate] [drift] [--data FOLDER] [--seeds 32]
        [--years 10000] [--results FILE] [--work FOLDER]

- `models` trains the same VAE from `--seeds` seeds on 20,000 of MNIST's training images, and eight
  on the sample digits with the parameters they are shipped with, and keeps what each says of images
  that none was trained on. Takes half a minute a seed; what is there already is left.
- `gate` simulates years of nightly retrainings. Challenger and champion are equal: how they differ,
  image by image, is how two seeds of one training do, without the mean of that over MNIST's 10,000
  test images. In each year as many of these images as are compared are drawn anew. Beside the gate
  stands the rule it had before, more than two standard errors every night. Then, how many images it
  takes to see a gain.
- `drift` simulates years of nightly batches of MNIST's test images, compared with others of them
  as `vaeflow drift` compares (`scoring.drift.run_tests`), and batches whose latents have been
  shifted.

Results go into `benchmarks/results/decisions.json`; those of parts that are not run stay. All of it
is drawn from fixed seeds.
"""

import vaeflow  # noqa: F401 - before Keras: chooses TensorFlow's kernels

# isort: split
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
from machine import machine
from mnist import mnist
from scipy import stats

from vaeflow.bundle.manifest import Reference
from vaeflow.common.files import atomic_file, write_json
from vaeflow.config.schema import Drift, Registry, load_parameters
from vaeflow.registry.comparison import POWER, error_spent_by, level_of_try
from vaeflow.scoring.drift import Sample, run_tests

REPOSITORY = Path(__file__).parents[1]
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"
RESULTS = REPOSITORY / "benchmarks" / "results" / "decisions.json"
WORK = REPOSITORY / "benchmarks" / "work" / "decisions"
NIGHTS = 365
SAMPLES = 64  # draws of t in the bound, as `registry.samples` has it
SAMPLE_SEEDS = 8
GAINS = (0.1, 0.5, 1.0, 2.0)
# Images of reference and batch, and how many years: those of many images take hours.
SIZES = ((180, 158, 20), (180, 1000, 4), (5000, 158, 4), (5000, 1000, 2))


def main() -> None:
    """Run the parts that are named, by default all."""
    arguments = parse()
    parts = arguments.parts or ["models", "gate", "drift"]
    if "models" in parts:
        train_models(arguments)
    for name, part in (("gate", gate), ("drift", drift)):
        if name in parts:
            began = time.perf_counter()
            found = part(arguments)
            found |= {"seconds": round(time.perf_counter() - began), **machine()}
            keep(arguments.results, name, found)
            print(json.dumps({name: found}, indent=2))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="models, gate, drift")
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's IDX files")
    parser.add_argument("--seeds", type=int, default=32, help="models of MNIST")
    parser.add_argument("--years", type=int, default=10_000, help="simulated of the gate")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are merged")
    parser.add_argument("--work", type=Path, default=WORK, help="where models' bounds are kept")
    return parser.parse_args()


def keep(path: Path, name: str, found: dict) -> None:
    """Put a part's results in the place of its last ones."""
    results = json.loads(path.read_text()) if path.exists() else {}
    with atomic_file(path) as fresh:
        write_json(fresh, results | {name: found})


# === Models ===


def train_models(arguments: argparse.Namespace) -> None:
    """Train the same model from several seeds; keep bounds and latents of the test images."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        path = arguments.work / f"mnist-{seed}.npz"
        if not path.exists():
            train_on_mnist(path, seed, arguments.data)
    for seed in range(SAMPLE_SEEDS):
        path = arguments.work / f"sample-{seed}.npz"
        if not path.exists():
            train_on_sample(path, seed)


def train_on_mnist(path: Path, seed: int, data: Path) -> None:
    """A small model, trained for some seconds."""
    import keras

    from vaeflow.config.model import VAEConfig
    from vaeflow.data.batches import Batches
    from vaeflow.model.vae import VAE

    keras.utils.set_random_seed(seed)
    sizes = {"latent_dim": 16, "filters": (16, 32), "hidden_units": 128}
    vae = VAE(VAEConfig((28, 28, 1), binarize="dynamic", seed=seed, **sizes))
    vae.compile(optimizer=keras.optimizers.Adam(2e-3))
    images = Batches(mnist(data, "train")[:20_000], 128, shuffle_seed=seed)
    vae.fit(images.feed(), epochs=6, verbose=0, shuffle=False)
    judge(path, vae, mnist(data, "test"))


def train_on_sample(path: Path, seed: int) -> None:
    """The model that `make repro` trains, from another seed."""
    import keras
    from sklearn.datasets import load_digits

    from vaeflow.data.batches import Batches
    from vaeflow.data.splits import SplitRule, pixel_digests
    from vaeflow.training.loop import make_compiled

    parameters = load_parameters(REPOSITORY / "params.yaml")
    digits = np.rint(load_digits().images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    splits = SplitRule.of(parameters.prepare).assign(pixel_digests(digits))
    settings = parameters.train.model_copy(update={"seed": seed})
    keras.utils.set_random_seed(seed)
    images = digits[splits == "train"]
    vae = make_compiled(digits.shape[1:], len(images), settings)
    feed = Batches(images, settings.batch_size, shuffle_seed=seed).feed()
    vae.fit(feed, epochs=settings.epochs, verbose=0, shuffle=False)
    judge(path, vae, digits[splits == "test"])


def judge(path: Path, vae, images: np.ndarray) -> None:
    """Keep what a model says of images."""
    from vaeflow.evaluation.bounds import compute_bounds

    bounds = compute_bounds(vae, images, SAMPLES, seed=0)
    bound = bounds.importance_weighted_bound
    with atomic_file(path) as fresh, fresh.open("wb") as file:
        np.savez(file, bound=bound, elbo=bounds.elbo, means=bounds.means)
    print(f"{path.name}: {bound.mean():.3f} nats on {len(images)} test images", flush=True)


def load(arguments: argparse.Namespace, name: str) -> list[dict[str, np.ndarray]]:
    """What the models of one kind said."""
    paths = sorted(arguments.work.glob(f"{name}-*.npz"))
    if len(paths) < 2:
        raise SystemExit(
            f"{arguments.work} holds no models of {name}: run the part `models` first."
        )
    return [dict(np.load(path)) for path in paths]


# === The gate ===


def gate(arguments: argparse.Namespace) -> dict:
    """False promotions in simulated years, and the images it takes to see a gain."""
    bounds = np.stack([model["bound"] for model in load(arguments, "mnist")])
    sample = np.stack([model["bound"] for model in load(arguments, "sample")])
    whole = Registry().false_promotions
    spread = {name: spread_of(of) for name, of in (("mnist", bounds), ("sample", sample))}
    years = [
        simulate(bounds, images, arguments.years, fresh, whole)
        for images in (158, 2000)
        for fresh in (False, True)
    ]
    return {
        "false_promotions": whole,
        "models": len(bounds),
        "pairs": spread,
        "years": years,
        "spent_in_a_year": round(error_spent_by(NIGHTS, whole), 5),
        "images_for_a_gain": {
            name: images_needed(found["standard_deviation"], whole)
            for name, found in spread.items()
        },
        "smallest_gain": {
            f"{name}, {count} images, try {attempt}": round(
                smallest_gain(spread[name]["standard_deviation"], count, attempt, whole), 3
            )
            for name, count in (("sample", sample.shape[1]), ("mnist", 158), ("mnist", 2000))
            for attempt in (1, NIGHTS)
        },
        "checked": power_of_real_pairs(bounds, whole),
    }


def differences_of(bounds: np.ndarray) -> np.ndarray:
    """Of all ordered pairs of models, image by image: `(pairs, images)`."""
    first, second = np.nonzero(~np.eye(len(bounds), dtype=bool))
    return bounds[first] - bounds[second]


def spread_of(bounds: np.ndarray) -> dict:
    """What the differences of two seeds of one training are like."""
    differences = differences_of(bounds)
    deviations = differences.std(axis=1, ddof=1)
    means = np.abs(differences.mean(axis=1))
    return {
        "images": bounds.shape[1],
        "standard_deviation": round(float(np.median(deviations)), 3),
        "least": round(float(deviations.min()), 3),
        "most": round(float(deviations.max()), 3),
        "skewness_at_most": round(float(np.abs(stats.skew(differences, axis=1)).max()), 2),
        "difference_of_means": round(float(np.median(means)), 3),
    }


def simulate(bounds: np.ndarray, images: int, years: int, fresh: bool, whole: float) -> dict:
    """Years in which every night an equal challenger is tried.

    Args:
        bounds: of the models, `(models, images)`.
        images: that are compared, drawn anew (with replacement) for every year.
        years: how many.
        fresh: whether they are drawn anew for every night, too: then no night depends on another,
            for which the error is the largest that it can be.
        whole: the error that all tries of a life may spend.
    """
    random = np.random.default_rng(0)
    centred = differences_of(bounds).astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    levels = np.array([level_of_try(night, whole) for night in range(1, NIGHTS + 1)])
    limits = stats.t.isf(levels, images - 1)
    any_by_gate, any_by_two, by_two = 0, 0, 0
    for _ in range(years):
        if fresh:
            statistics = statistics_of_nights(centred, images, random)
        else:
            statistics = statistics_of_pairs(centred, images, random)
        any_by_gate += bool((statistics > limits).any())
        promoted = np.count_nonzero(statistics > 2)
        any_by_two, by_two = any_by_two + bool(promoted), by_two + promoted
    return {
        "images": images,
        "drawn_anew": "every night" if fresh else "every year",
        "years": years,
        "share_with_a_false_promotion": round(any_by_gate / years, 5),
        "standard_error": round(math.sqrt(any_by_gate * (years - any_by_gate) / years**3), 5),
        "two_standard_errors": {
            "share_with_a_false_promotion": round(any_by_two / years, 5),
            "false_promotions_a_year": round(by_two / years, 2),
        },
    }


def statistics_of_pairs(centred: np.ndarray, images: int, random) -> np.ndarray:
    """Of 365 pairs of models on the same images."""
    rows = random.integers(centred.shape[1], size=images)
    pairs = random.integers(len(centred), size=NIGHTS)
    return t_statistics(centred[pairs[:, None], rows])


def statistics_of_nights(centred: np.ndarray, images: int, random) -> np.ndarray:
    """Of 365 pairs of models, each on images of its own."""
    rows = random.integers(centred.shape[1], size=(NIGHTS, images))
    pairs = random.integers(len(centred), size=(NIGHTS, 1))
    return t_statistics(centred[pairs, rows])


def t_statistics(differences: np.ndarray) -> np.ndarray:
    """Student's, of each row."""
    count = differences.shape[1]
    means = differences.mean(axis=1, dtype=np.float64)
    squares = np.einsum("ij,ij->i", differences, differences, dtype=np.float64) / count
    return means / np.sqrt((squares - means**2) / (count - 1))


def smallest_gain(deviation: float, images: int, attempt: int, whole: float) -> float:
    """The gain in nats that a try sees nine times out of ten."""
    freedom = images - 1
    quantiles = stats.t.isf(level_of_try(attempt, whole), freedom) + stats.t.ppf(POWER, freedom)
    return quantiles * deviation / math.sqrt(images)


def images_needed(deviation: float, whole: float) -> dict:
    """How many test images it takes to see a gain nine times out of ten, in one try."""
    needed = {}
    for attempt in (1, NIGHTS):
        for gain in GAINS:
            low, high = 3, 10**8
            while low < high:
                middle = (low + high) // 2
                enough = smallest_gain(deviation, middle, attempt, whole) <= gain
                low, high = (low, middle) if enough else (middle + 1, high)
            needed.setdefault(f"try {attempt}", {})[f"{gain:g} nats"] = low
    return needed


def power_of_real_pairs(bounds: np.ndarray, whole: float, repeats: int = 20_000) -> dict:
    """How often the first try sees the gain that it should see nine times out of ten."""
    random = np.random.default_rng(1)
    centred = differences_of(bounds).astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    seen = {}
    for images in (158, 2000):
        found = []
        for _ in range(repeats // 100):
            pairs = random.integers(len(centred), size=(100, 1))
            rows = random.integers(centred.shape[1], size=(100, images))
            drawn = centred[pairs, rows]
            deviations = centred[pairs[:, 0]].std(axis=1)
            gains = [smallest_gain(deviation, images, 1, whole) for deviation in deviations]
            limit = stats.t.isf(level_of_try(1, whole), images - 1)
            found.append(t_statistics(drawn + np.array(gains, np.float32)[:, None]) > limit)
        seen[f"{images} images"] = round(float(np.mean(found)), 3)
    return seen


# === Drift ===


def drift(arguments: argparse.Namespace) -> dict:
    """False alarms in simulated years, and the smallest shift that is found."""
    model = load(arguments, "mnist")[0]
    means, scores = model["means"], -model["elbo"]
    thresholds = Drift()
    return {
        "thresholds": thresholds.model_dump(),
        "latents": means.shape[1],
        "false_alarms": [false_alarms(means, scores, *sizes, thresholds) for sizes in SIZES],
        "smallest_shift": [
            smallest_shift(means, scores, reference, batch, which, thresholds)
            for reference, batch, _ in SIZES
            for which in ("every latent", "one latent")
        ],
    }


def drawn(means, scores, reference: int, batch: int, random) -> tuple[Reference, Sample]:
    """A reference and a batch of other images."""
    rows = random.choice(len(means), reference + batch, replace=False)
    ours, theirs = rows[:reference], rows[reference:]
    return Reference(means[ours], scores[ours]), Sample(means[theirs], scores[theirs], batch, {})


def false_alarms(means, scores, reference: int, batch: int, years: int, thresholds: Drift) -> dict:
    """Alarms in years of nights on which nothing has changed; each year has its own reference."""
    random = np.random.default_rng(0)
    alarms = []
    for _ in range(years):
        rows = random.permutation(len(means))
        ours, others = rows[:reference], rows[reference:]
        known = Reference(means[ours], scores[ours])
        count = 0
        for _ in range(NIGHTS):
            rows = random.choice(others, batch, replace=False)
            count += run_tests(
                known, Sample(means[rows], scores[rows], batch, {}), thresholds
            ).drifted
        alarms.append(count)
    return {
        "reference_images": reference,
        "batch_images": batch,
        "years": years,
        "alarms_a_year": round(float(np.mean(alarms)), 3),
        "years_with_any": int(np.count_nonzero(alarms)),
        "most_in_a_year": int(np.max(alarms)),
    }


def smallest_shift(
    means, scores, reference: int, batch: int, which: str, thresholds: Drift, repeats: int = 40
) -> dict:
    """The shift, in standard deviations, that is found in nine batches of ten."""
    random = np.random.default_rng(1)
    deviations = means.std(axis=0)
    latents = slice(None) if which == "every latent" else int(deviations.argmax())
    for shift in np.arange(0.05, 3, 0.05):
        found = 0
        for _ in range(repeats):
            known, sample = drawn(means, scores, reference, batch, random)
            sample.means[:, latents] += shift * deviations[latents]
            found += run_tests(known, sample, thresholds).drifted
        if found >= POWER * repeats:
            break
    return {
        "reference_images": reference,
        "batch_images": batch,
        "shifted": which,
        "standard_deviations": round(float(shift), 2),
    }


if __name__ == "__main__":
    main()
