"""What `auto` stands for: by the images, by what is set, by a champion."""

import json

import pytest

from vaeflow.config.auto import (
    SHAPE_KEY,
    DataFacts,
    choose,
    describe,
    kept_values,
    open_keys,
    plain,
    read_facts,
    resolve,
    small_data_warning,
)
from vaeflow.config.schema import Parameters, Train, validate
from vaeflow.errors import ConfigError, WorkspaceError

DIGITS = DataFacts((8, 8, 1), 1437, 17)
MNIST = DataFacts((28, 28, 1), 60_000, 256)
SCANS = DataFacts((64, 48, 1), 500, 2)
COLOUR = DataFacts((64, 64, 3), 10_000, 256)
ALL = (DIGITS, MNIST, SCANS, COLOUR, DataFacts((1, 1, 1), 1, 2), DataFacts((512, 9, 4), 9, 99))


@pytest.mark.parametrize("facts", ALL)
def test_everything_that_may_be_auto_is_chosen_and_allowed(facts):
    settings, chosen = resolve(Train(), facts)
    assert list(chosen) == Train.auto_keys()
    assert set(choose(facts)) == set(Train.auto_keys())
    assert not open_keys(settings)
    config = settings.model(facts.image_shape, 10)
    assert (config.likelihood, config.levels) == (chosen["likelihood"], facts.levels)
    assert settings.kl_warmup_epochs <= settings.epochs


def test_the_likelihood_is_a_proper_one_of_the_levels():
    assert choose(SCANS)["likelihood"] == "bernoulli"
    for facts in (DIGITS, MNIST, COLOUR):
        assert (choose(facts)["likelihood"], choose(facts)["levels"]) == (
            "mixture_logistic",
            facts.levels,
        )


def test_sizes_grow_with_the_images_and_epochs_shrink_with_their_number():
    ordered = [choose(facts) for facts in (DIGITS, MNIST, COLOUR)]
    for key in ("latent_dim", "hidden_units"):
        values = [chosen[key] for chosen in ordered]
        assert values == sorted(values)
    assert [len(chosen["filters"]) for chosen in ordered] == [2, 2, 3]
    few, many = (choose(MNIST._replace(images=count)) for count in (2_000, 200_000))
    assert few["epochs"] > many["epochs"] >= 10
    assert few["patience"] > 0 == many["patience"]
    fewer = choose(MNIST._replace(images=1_999))
    assert fewer["hidden_units"] < few["hidden_units"]


def test_what_is_set_wins_and_decides_what_goes_with_it():
    settings, chosen = resolve(Train(latent_dim=3, binarize="dynamic", epochs=5), MNIST)
    assert (settings.latent_dim, settings.likelihood) == (3, "bernoulli")
    assert {"latent_dim", "binarize", "epochs"}.isdisjoint(chosen)
    assert settings.kl_warmup_epochs == 0  # a tenth of 5 epochs
    assert resolve(settings, COLOUR) == (settings, {})


def test_what_does_not_go_together_is_said_before_training():
    with pytest.raises(ConfigError, match="finish_epochs must be at most epochs"):
        resolve(Train(finish_epochs=300), COLOUR)


def recorded(facts, **changes):
    settings, _ = resolve(Train(), facts)
    parameters = Parameters(train=settings.model_copy(update=changes))
    texts = {key: str(value) for key, value in parameters.flat().items()}
    return {**texts, SHAPE_KEY: str(list(facts.image_shape))}


def test_a_champions_values_are_kept_whatever_the_new_images_are():
    champion = recorded(DIGITS, latent_dim=5)
    more = DIGITS._replace(images=50_000, levels=256)  # one image of another scanner
    kept = kept_values(Train(), more, champion)
    settings, chosen = resolve(Train(), more, kept)
    assert (settings.latent_dim, settings.levels, settings.filters) == (5, 17, (32, 64))
    assert list(chosen) == Train.auto_keys()
    assert resolve(Train(latent_dim=7), more, kept)[0].latent_dim == 7


@pytest.mark.parametrize(
    "champion",
    [
        None,
        {},
        {**recorded(DIGITS), SHAPE_KEY: "[9, 9, 1]"},
        {**recorded(DIGITS), "train.likelihood": "poisson"},
    ],
)
def test_what_cannot_be_kept_is_chosen_anew(champion):
    assert kept_values(Train(), DIGITS, champion) is None


def test_few_images_are_warned_of():
    assert "200 images" in (small_data_warning(DIGITS._replace(images=200)) or "")
    assert small_data_warning(DIGITS) is None


def test_the_images_and_values_are_said_as_a_reader_would():
    assert describe(DIGITS) == "1,437 images to train on, 8 x 8, grey, 17 levels"
    assert describe(SCANS) == "500 images to train on, 64 x 48, black and white"
    assert describe(COLOUR) == "10,000 images to train on, 64 x 64, colour, 256 levels"
    assert plain((32, 64)) == "[32, 64]"


def test_facts_of_an_older_version_are_made_anew(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"image_shape": [8, 8, 1]}))
    with pytest.raises(WorkspaceError, match="dvc repro prepare"):
        read_facts(tmp_path)


def test_auto_is_named_among_what_is_allowed():
    with pytest.raises(ConfigError, match=r"train\.latent_dim: .*integer, or 'auto', found 'many'"):
        validate({"train": {"latent_dim": "many"}}, "params.yaml")
    with pytest.raises(ConfigError, match=r"train\.samples: .*integer, found 'auto'"):
        validate({"train": {"samples": "auto"}}, "params.yaml")
