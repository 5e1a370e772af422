"""Files that say what a sweep searches, and those that cannot be used."""

import pytest

from vaeflow.config.auto import DataFacts
from vaeflow.config.schema import Parameters
from vaeflow.errors import ConfigError
from vaeflow.tuning.space import Choices, Range, read_space

FACTS = DataFacts((8, 8, 1), 1000, 17)


def read(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return read_space(path, Parameters(), FACTS)


def test_choices_and_ranges(tmp_path):
    space = read(
        tmp_path,
        """
        train.filters: [[16, 32], [32, 64]]
        train.latent_dim: {low: 8, high: 64, log: true}
        train.learning_rate: {low: 1e-4, high: 0.01, log: true}
        train.depth: {low: 1, high: 5, step: 2}
        train.likelihood: [discretized_logistic, mixture_logistic]
        train.batch_size: [auto, 64]
        """,
    )
    assert space == {
        "train.filters": Choices(([16, 32], [32, 64])),
        "train.latent_dim": Range(8, 64, log=True),
        "train.learning_rate": Range(1e-4, 0.01, log=True),
        "train.depth": Range(1, 5, step=2),
        "train.likelihood": Choices(("discretized_logistic", "mixture_logistic")),
        "train.batch_size": Choices(("auto", 64)),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a line a parameter"),
        ("- train.depth", "expected a line a parameter"),
        ("train.depth: [1", "cannot be read as YAML"),
        ("train.latent: [1]", "did you mean train.latent_dim?"),
        ("prepare.seed: [1, 2]", "only keys of train"),
        ("latent_dim: [1, 2]", "only keys of train"),
        ("train.seed: [1, 2]", "luckiest seed"),
        ("train.auto: [data]", "cannot be searched"),
        ("train.depth: []", "expected \\[choices\\] or"),
        ("train.depth: 3", "expected \\[choices\\] or"),
        ("train.depth: [0]", "train.depth: .* greater than or equal to 1"),
        ("train.depth: {low: 1}", "train.depth: high missing"),
        ("train.depth: {}", "train.depth: low and high missing"),
        ("train.depth: {low: 1, high: 2, base: 2}", "base: expected low, high, log, step"),
        ("train.depth: {low: 2, high: 1}", "low must be below high"),
        ("train.depth: {low: a, high: 1}", "low must be a number, found 'a'"),
        ("train.depth: {low: true, high: 2}", "low must be a number, found True"),
        ("train.depth: {low: 0, high: 2}", "train.depth: .* greater than or equal to 1"),
        ("train.depth: {low: 1, high: 2, log: 3}", "log must be true or false"),
        ("train.beta: {low: 0, high: 2, log: true}", "low must be above 0"),
        ("train.depth: {low: 1, high: 9, step: 0.5}", "step must be above 0, and whole"),
        ("train.depth: {low: 1.5, high: 2}", "train.depth: .*integer"),
        ("train.likelihood: [bernoulli, mixture_logistic]", "could not be compared"),
        ("train.binarize: [none, dynamic]", "could not be compared"),
        ("train.levels: [17, 256]", "could not be compared"),
    ],
)
def test_what_cannot_be_searched(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)


def test_all_faults_are_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "train.latent: [1]\nprepare.seed: [1]")
    assert "latent_dim" in str(error.value) and "only keys of train" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"space.yaml cannot be read as YAML: No such file"):
        read_space(tmp_path / "space.yaml", Parameters(), FACTS)
