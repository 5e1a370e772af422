"""Every combination of what can be chosen trains, exports and answers, or is refused beforehand.

Every pair of choices is among those that run by default; `make test-combinations` runs all.
"""

import itertools
import typing

import keras
import numpy as np
import pytest
from model_bundles import write_bundle

from vaeflow.bundle.runtime import Bundle
from vaeflow.config.model import CHOICES, Network, VAEConfig
from vaeflow.config.schema import validate
from vaeflow.errors import ConfigError
from vaeflow.model.steps.optimizer import Adam
from vaeflow.model.vae import VAE

KEYS = ("likelihood", "binarize", "prior", "objective", "network")
KINDS = [*(CHOICES[key] for key in KEYS[:-1]), Network]
SHAPE = (9, 7, 3)
ALL = [
    dict(zip(KEYS, values, strict=True))
    for values in itertools.product(*(typing.get_args(kind) for kind in KINDS))
]


def is_allowed(choice):
    return choice["binarize"] == "none" or choice["likelihood"] == "bernoulli"


def pairs_of(choice):
    return set(itertools.combinations(choice.items(), 2))


def covering(choices):
    """Few of the choices in which every pair stands that stands in any."""
    left = set().union(*map(pairs_of, choices))
    chosen = []
    while left:
        best = max(choices, key=lambda choice: len(left & pairs_of(choice)))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


ALLOWED = [choice for choice in ALL if is_allowed(choice)]
FEW = covering(ALLOWED)


def name_of(choice):
    return " ".join(choice.values())


def trains_exports_and_answers(choice, folder):
    keras.utils.set_random_seed(0)
    samples = 1 if choice["objective"] == "elbo" else 3
    sizes = {"latent_dim": 1, "filters": (4,), "hidden_units": 8, "prior_couplings": 2}
    vae = VAE(VAEConfig(SHAPE, **sizes, **choice, samples=samples, mixtures=2))
    vae.compile(optimizer=Adam(0.01))
    images = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), dtype=np.uint8)
    history = vae.fit(images, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["skipped_steps"] == [0]

    model = Bundle(write_bundle(folder, vae))
    noise = np.random.default_rng(5).standard_normal((4, 1, 1), dtype=np.float32)
    elbo = keras.ops.convert_to_numpy(vae.terms(images / np.float32(255), noise).elbo)
    np.testing.assert_allclose(model.score(images, samples=4, seed=5), -elbo, rtol=2e-4)
    assert model.sample(3, seed=0).shape == (3, *SHAPE)


@pytest.mark.parametrize("choice", FEW, ids=name_of)
def test_every_pair_of_choices_trains_exports_and_answers(choice, tmp_path):
    trains_exports_and_answers(choice, tmp_path)


@pytest.mark.combinations
@pytest.mark.parametrize("choice", [choice for choice in ALLOWED if choice not in FEW], ids=name_of)
def test_every_other_combination_does(choice, tmp_path):
    trains_exports_and_answers(choice, tmp_path)


@pytest.mark.parametrize(
    "choice", [choice for choice in ALL if not is_allowed(choice)], ids=name_of
)
def test_the_others_are_refused_with_the_valid_choices(choice):
    with pytest.raises(ConfigError, match="binarize must be none with likelihood"):
        validate({"train": {**choice, "samples": 2}}, "params.yaml")
