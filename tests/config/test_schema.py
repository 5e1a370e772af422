from dataclasses import fields
from typing import get_args

import pytest
from helpers import REPOSITORY, SAMPLE
from hypothesis import given
from hypothesis import strategies as st

from vaeflow.config.model import Likelihood, Network, VAEConfig
from vaeflow.config.schema import Parameters, Train, load_parameters
from vaeflow.errors import ConfigError
from vaeflow.model.likelihoods import LIKELIHOODS
from vaeflow.model.networks import NETWORKS


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return write


def test_the_shipped_file_is_valid_and_complete():
    path = SAMPLE / "params.yaml"
    parameters = load_parameters(path)
    written = {line.split(":")[0].strip() for line in path.read_text().splitlines() if ":" in line}
    assert {key.split(".")[1] for key in parameters.flat()} <= written


def test_the_first_sections_are_the_stages_of_dvc_yaml():
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    without = stages.pop("report")
    assert "params" not in without
    assert [*stages, "registry", "drift"] == list(Parameters.model_fields)
    assert all(stage["params"] == [name] for name, stage in stages.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epoch: 3}", "train.epoch: no such key; did you mean train.epochs?"),
        ("train: {latent_size: 3}", "did you mean train.latent_dim?"),
        ("trian: {epochs: 3}", "trian: no such key; did you mean train?"),
        ("epochs: 3", "epochs: no such key; did you mean train.epochs?"),
        ("evaluate: {importance: 3}", "did you mean evaluate.importance_samples?"),
        (
            "train: {epochs: '3'}",
            "train.epochs: Input should be a valid integer, or 'auto', found '3'.",
        ),
        ("train: {epochs: 3.0}", "train.epochs: Input should be a valid integer"),
        ("train: {epochs: true}", "train.epochs: Input should be a valid integer"),
        ("train: {epochs: 0}", "train.epochs: Input should be greater than or equal to 1"),
        ("train: {samples: 0}", "train.samples: Input should be greater than or equal to 1"),
        ("train: {network: mlp}", "train.network: Value error, expected one of conv, residual, or"),
        ("train: {weight_average: 1.0}", "train.weight_average: Input should be less than 1"),
        ("train: {learning_rate_schedule: step}", "should be 'constant', 'cosine' or 'plateau'"),
        ("train: {depth: 0}", "train.depth: Input should be greater than or equal to 1"),
        ("train: {likelihood: normal}", "should be 'bernoulli', 'gaussian', 'discretized_log"),
        (
            "train: {binarize: once}",
            "should be 'none', 'static' or 'dynamic', or 'auto', found 'once'",
        ),
        (
            "train: {likelihood: gaussian, binarize: dynamic}",
            "binarize must be none with likelihood gaussian; dynamic needs likelihood: bernoulli",
        ),
        ("evaluate: {importance_samples: 5001}", "Input should be less than or equal to 5000"),
        ("train: {objective: iwae}", "should be 'elbo' or 'importance_weighted', found 'iwae'"),
        (
            "train: {objective: importance_weighted, free_bits: 0.1}",
            "or choose objective: elbo",
        ),
        ("train: {epochs: 3, kl_warmup_epochs: 4}", "kl_warmup_epochs must be at most epochs"),
        ("train: {epochs: 3, finish_epochs: 4}", "finish_epochs must be at most epochs"),
        ("train: {finish_epochs: 1, free_bits: 0.1}", "finish_epochs must be 0 unless"),
        (
            "train: {finish_epochs: 1, objective: importance_weighted}",
            "finish_epochs must be 0 unless objective is elbo",
        ),
        ("train: {finish_samples: 1}", "train.finish_samples: Input should be greater than or"),
        ("train: {precision: float16}", "should be 'auto', 'float32' or 'mixed_bfloat16'"),
        ("train: {beta: -1.0}", "train.beta: Input should be greater than or equal to 0"),
        ("train: {latent_dim: -1}", "train.latent_dim: Input should be greater than or equal"),
        ("train: {filters: [32, '64']}", "train.filters.1: Input should be a valid integer"),
        ("train: {filters: []}", "train.filters"),
        ("train: {learning_rate: .nan}", "train.learning_rate: Input should be"),
        ("train: 3", "train: Input should be"),
        ("export: {name: a/b}", "export.name: String should match pattern"),
        (
            "prepare: {validation_fraction: 0.5, test_fraction: 0.5}",
            "must add up to less than 1",
        ),
        ("- 1", "expected sections (prepare, train, evaluate, export, registry, drift)"),
        ("", "expected sections"),
        ("train: {", "is not valid YAML"),
    ],
)
def test_what_is_not_allowed_is_named(write, text, expected):
    path = write(text)
    with pytest.raises(ConfigError) as raised:
        load_parameters(path)
    assert expected in str(raised.value)
    assert str(path) in str(raised.value)


def test_all_faults_are_named_at_once(write):
    with pytest.raises(ConfigError) as raised:
        load_parameters(write("train: {epochs: x, batch: 3}\nprepare: {seed: -1}"))
    for key in ("train.epochs", "train.batch", "prepare.seed"):
        assert key in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"git checkout params\.yaml"):
        load_parameters(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(write):
    assert load_parameters(write("train: {learning_rate: 1e-4}")).train.learning_rate == 1e-4


def test_the_digest_ignores_layout_and_spelled_out_defaults(write):
    plain = load_parameters(write("train: {samples: 1}")).sha256()
    assert plain == load_parameters(write("# note\ntrain:\n  samples: 1\n")).sha256()
    assert plain == Parameters().sha256()
    assert plain != load_parameters(write("train: {samples: 2}")).sha256()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), min_size=1))
def test_any_section_is_either_valid_or_refused_with_its_keys(tmp_path_factory, section):
    from ruamel.yaml import YAML

    path = tmp_path_factory.mktemp("any") / "params.yaml"
    YAML(typ="safe", pure=True).dump({"train": section}, path)
    try:
        load_parameters(path)
    except ConfigError as error:
        assert "train." in str(error) or "not valid YAML" in str(error)


def test_what_of_the_model_can_be_set_has_the_models_defaults():
    """Of a VAE's parameters only the shape and the steps come from elsewhere than `params.yaml`."""
    names = {field.name for field in fields(VAEConfig)} - {"image_shape", "kl_warmup_steps"}
    assert names <= set(Train.model_fields)
    defaults = VAEConfig((8, 8, 1))
    chosen = {key: getattr(defaults, key) for key in Train.auto_keys() if hasattr(defaults, key)}
    settings = Train(**chosen, epochs=2, kl_warmup_epochs=0)
    assert settings.model((8, 8, 1), 4) == defaults
    longer = settings.with_values({"kl_warmup_epochs": 2})
    assert longer.model((8, 8, 1), 4).kl_warmup_steps == 8
    with pytest.raises(ValueError, match=r"train\.depth: choose a value"):
        Train(**{**chosen, "depth": "auto"}).model((8, 8, 1), 4)
    assert set(get_args(Likelihood)) == set(LIKELIHOODS)
    assert set(get_args(Network)) == set(NETWORKS)
