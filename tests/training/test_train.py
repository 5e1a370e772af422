"""Fitting on prepared images, without DVC or MLflow."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from helpers import PLAIN

from vaeflow.config.schema import Parameters
from vaeflow.data.batches import Batches
from vaeflow.errors import ConfigError, TrainingError
from vaeflow.model.device import has_gpu
from vaeflow.model.vae import VAE, load_vae
from vaeflow.training.callbacks import StopWhenSkipping
from vaeflow.training.loop import fit
from vaeflow.training.setup import check_memory
from vaeflow.training.train import kept_row


def settings(**train):
    small = {**PLAIN, "epochs": 2, "filters": [4], "hidden_units": 8, "latent_dim": 2, **train}
    return Parameters.model_validate({"train": small})


@pytest.fixture
def one_step_at_a_time(monkeypatch):
    """Callbacks are called after each step."""
    monkeypatch.setattr("vaeflow.training.loop.choose_steps_per_execution", lambda: 1)


def test_the_models_settings_are_the_parameters(prepared):
    vae = fit(prepared, settings(samples=3, objective="importance_weighted", kl_warmup_epochs=2))
    assert (vae.config.samples, vae.config.objective) == (3, "importance_weighted")
    assert vae.config.kl_warmup_steps == 2 * 4  # 200 images in batches of 64
    assert float(vae.steps) == 8


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_last_epochs_maximise_the_tighter_bound_and_go_on_from_the_others(prepared, average):
    epochs = {}
    vae = fit(
        prepared,
        settings(
            epochs=20, finish_epochs=1, finish_samples=5, weight_average=average, learning_rate=0.01
        ),
        report=lambda row: epochs.setdefault(row["epoch"], row),
    )
    assert list(epochs) == list(range(1, 21))
    for before in (epochs[1], epochs[19]):
        assert before["loss"] == pytest.approx(-before["elbo"], rel=1e-6)
    last = epochs[20]
    assert last["loss"] < -last["elbo"] - 0.01  # several draws: the bound is above the elbo
    assert last["validation_loss"] < -last["validation_elbo"] - 0.01
    assert last["elbo"] > epochs[1]["elbo"] + 1  # weights went on from where they were
    assert (vae.config.objective, vae.config.samples) == ("importance_weighted", 5)
    # So did Adam, with its moments and its learning rate: 200 images in batches of 64.
    assert int(vae.optimizer.iterations) == int(vae.steps) == 20 * 4


def test_trained_in_mixed_precision_it_is_kept_and_computes_in_full(prepared, tmp_path):
    vae = fit(prepared, settings(precision="mixed_bfloat16", samples=2))
    assert {layer.compute_dtype for layer in vae.encoder.layers} == {"float32", "bfloat16"}
    assert {weights.dtype for weights in vae.get_weights()} == {np.dtype("float32")}
    assert keras.config.dtype_policy().name == "float32"
    vae.save(tmp_path / "model.keras")
    again = load_vae(tmp_path / "model.keras")
    layers = [*again.encoder.layers, *again.decoder.layers, again]
    assert {layer.compute_dtype for layer in layers} == {"float32"}
    image = np.load(prepared / "validation.npy")[:1].astype("float32") / 255
    full, mixed = (np.array(model(image)["reconstruction"]) for model in (again, vae))
    np.testing.assert_allclose(full, mixed, atol=0.02)
    assert not np.array_equal(full, mixed)


def test_compiled_with_xla_it_learns_as_much(prepared):
    elbo = {True: [], False: []}
    for jit in (False, True):
        fit(
            prepared,
            settings(jit=jit, epochs=20, learning_rate=0.01, binarize="dynamic"),
            report=lambda row, jit=jit: elbo[jit].append(row["validation_elbo"]),
        )
    learned = {jit: values[-1] - values[0] for jit, values in elbo.items()}
    assert learned[False] > 5
    # Its generator draws other numbers from the same seed: the two differ by that noise.
    assert learned[True] == pytest.approx(learned[False], rel=0.2)


def test_without_a_gpu_auto_is_full_precision_and_no_xla(prepared):
    if has_gpu():
        pytest.skip("TensorFlow sees a GPU")
    vae = fit(prepared, settings(epochs=1))
    assert vae.jit_compile is False
    assert {layer.compute_dtype for layer in vae.decoder.layers} == {"float32"}


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_training_without_progress_ends_with_the_weights_that_were_validated_best(
    prepared, capsys, average
):
    losses = []

    class Spoil(keras.callbacks.Callback):
        """From the fourth epoch on, spoils what is trained."""

        def on_test_end(self, logs=None):
            losses.append(logs["loss"])

        def on_epoch_begin(self, epoch, logs=None):
            if epoch >= 3:
                for variable in self.model.trainable_variables:
                    variable.assign(variable + 1.0)

    patient, rows = settings(epochs=50, patience=2, weight_average=average), []
    vae = fit(prepared, patient, callbacks=[Spoil()], report=rows.append)
    best = int(np.argmin(losses))
    assert best == 2
    assert len(losses) == best + 1 + 2
    assert f"epoch {len(losses)} was the last; the weights of epoch 3" in capsys.readouterr().out
    validation = Batches(np.load(prepared / "validation.npy"), batch_size=64)
    again = vae.evaluate(validation, verbose=0, return_dict=True)
    assert again["loss"] == pytest.approx(losses[2], rel=1e-6)
    # Which is the epoch that the stage speaks of.
    kept = kept_row(rows, patient.train)
    assert (kept["epoch"], kept["validation_loss"]) == (3, pytest.approx(losses[2]))
    assert kept_row(rows, settings(patience=0).train) is rows[-1]


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_finish_goes_on_from_all_of_the_best_epoch(prepared, average):
    """Not from its weights with the moments and averages of the last one."""
    states = []

    class Watch(keras.callbacks.Callback):
        """Spoils what is trained from the third epoch on; keeps what each epoch begins with."""

        def on_epoch_begin(self, epoch, logs=None):
            variables = [*self.model.trainable_variables, *self.model.optimizer.variables]
            states.append((epoch, [variable.numpy() for variable in variables]))
            if 2 <= epoch < 9:
                for variable in self.model.trainable_variables:
                    variable.assign(variable + 1.0)

    patient = {"patience": 2, "learning_rate": 0.01, "weight_average": average}
    fit(prepared, settings(epochs=10, finish_epochs=1, **patient), callbacks=[Watch()])
    assert [epoch for epoch, _ in states] == [0, 1, 2, 3, 9]
    # The third began from the best, the second: so does the finish.
    for begun, finish in zip(states[2][1], states[-1][1], strict=True):
        np.testing.assert_array_equal(begun, finish)


def test_the_finish_makes_as_many_steps_at_once_as_the_rest(prepared, monkeypatch):
    monkeypatch.setattr("vaeflow.training.loop.choose_steps_per_execution", lambda: 4)
    calls = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            calls.append(self.model.config.objective)

    finishing = settings(epochs=2, finish_epochs=1, batch_size=10)  # 20 steps an epoch
    fit(prepared, finishing, callbacks=[Count()])
    assert calls == ["elbo"] * 5 + ["importance_weighted"] * 5


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_binarised_images_are_validated_on_binarised_images(prepared, capsys, binarize):
    vae = fit(prepared, settings(binarize=binarize))
    assert vae.config.binarize == binarize
    assert "warning" not in capsys.readouterr().out


def test_grey_pixels_under_bernoulli_are_warned_of_once(prepared, capsys):
    fit(prepared, settings())
    assert capsys.readouterr().out.count("warning: likelihood bernoulli on grey pixels") == 1


def test_the_same_seed_gives_the_same_weights_when_binarised(prepared):
    weights = [fit(prepared, settings(binarize="dynamic")).get_weights() for _ in range(2)]
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_training_that_makes_no_more_steps_stops_and_keeps_the_last_good_weights(
    prepared, tmp_path
):
    class Explode(keras.callbacks.Callback):
        """After the first steps, made at once, no gradient is small enough."""

        def on_train_batch_end(self, batch, logs=None):
            if batch == 7:
                self.model.config = replace(self.model.config, gradient_limit=0.0)
                self.model.make_train_function(force=True)
                self.good = [weight.numpy() for weight in self.model.trainable_variables]

    explode = Explode()
    keep = tmp_path / "outputs" / "stopped" / "model.keras"
    stop = StopWhenSkipping(3, 20, keep)
    with pytest.raises(TrainingError, match=r"epoch 1: 12 steps in a row .*stopped/model\.keras"):
        fit(prepared, settings(batch_size=10), callbacks=[explode, stop])
    kept = load_vae(keep)
    for variable, good in zip(kept.trainable_variables, explode.good, strict=True):
        np.testing.assert_array_equal(variable, good)


def test_skipping_every_step_of_an_epoch_stops_it_too(prepared, tmp_path):
    stop = StopWhenSkipping(1000, 4, tmp_path / "model.keras")
    with pytest.raises(TrainingError, match=r"epoch 1: 4 steps in a row"):
        fit(prepared, settings(gradient_limit=1e-9), callbacks=[stop])


def test_of_several_processes_only_the_leader_keeps_the_weights(prepared):
    stop = StopWhenSkipping(1000, 4, None)
    with pytest.raises(TrainingError, match="are kept in the leader"):
        fit(prepared, settings(gradient_limit=1e-9), callbacks=[stop])


def test_a_residual_network_is_built_from_the_parameters(prepared):
    vae = fit(prepared, settings(network="residual", depth=2, epochs=1))
    assert vae.encoder.get_layer("deepest_block_1").output.shape[1:] == (4, 4, 4)


class Recorder(keras.callbacks.Callback):
    """The weights and the learning rate after each step."""

    def __init__(self):
        super().__init__()
        self.weights, self.rates = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([weight.numpy() for weight in self.model.trainable_variables])
        self.rates.append(float(self.model.optimizer.learning_rate))


def test_the_weights_kept_are_the_running_mean_of_all_steps(prepared, one_step_at_a_time):
    recorder = Recorder()
    vae = fit(prepared, settings(weight_average=0.8), callbacks=[recorder])
    expected, *rest = recorder.weights
    for made, step in enumerate(rest, 1):
        # Over a tenth of the steps at first: 0.8 would have been reached after 40.
        share = min(settings(weight_average=0.8).train.weight_average, made / (made + 10))
        pairs = zip(expected, step, strict=True)
        expected = [share * old + (1 - share) * new for old, new in pairs]
    assert len(rest) == 7
    for variable, mean in zip(vae.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable, mean, atol=1e-6)


def test_the_learning_rate_falls_along_a_cosine(prepared, one_step_at_a_time):
    recorder = Recorder()
    fit(
        prepared,
        settings(learning_rate=0.01, learning_rate_schedule="cosine"),
        callbacks=[recorder],
    )
    steps = np.arange(1, 9)
    np.testing.assert_allclose(
        recorder.rates, 0.005 * (1 + np.cos(np.pi * steps / 8)), rtol=1e-4, atol=1e-8
    )


def test_on_a_plateau_the_learning_rate_is_halved(prepared, one_step_at_a_time):
    recorder = Recorder()
    losses = []
    fit(
        prepared,
        settings(epochs=12, learning_rate=0.5, learning_rate_schedule="plateau", plateau_epochs=2),
        report=lambda row: losses.append(row["validation_loss"]),
        callbacks=[recorder],
    )
    expected, best, since = [0.5], np.inf, 0
    for loss in losses[:-1]:
        since = 0 if loss < best else since + 1
        best = min(best, loss)
        lower = since == 2
        since = 0 if lower else since
        expected.append(expected[-1] * (0.5 if lower else 1.0))
    assert expected[-1] < 0.5  # it did come to that
    np.testing.assert_allclose(recorder.rates[::4], expected)


def test_a_clipped_gradient_has_its_direction_and_no_larger_norm(prepared):
    moved = []
    for clip in (0.0, 1e-3):
        keras.utils.set_random_seed(0)
        vae = VAE(settings(gradient_clip=clip).train.model((8, 8, 1), 1))
        vae.compile(keras.optimizers.SGD(1.0))
        before = [variable.numpy() for variable in vae.trainable_variables]
        vae.fit(Batches(np.load(prepared / "train.npy"), 200), verbose=0)
        after = [variable.numpy() for variable in vae.trainable_variables]
        steps = [np.ravel(new - old) for old, new in zip(before, after, strict=True)]
        moved.append(np.concatenate(steps))
    whole, clipped = moved
    limit = 1e-3 * 8 * 8
    assert np.linalg.norm(whole) > limit
    np.testing.assert_allclose(clipped, whole * limit / np.linalg.norm(whole), atol=1e-6)


def test_more_draws_than_fit_into_memory_are_refused_before_training(prepared):
    with pytest.raises(ConfigError, match=r"Set train\.samples to \d+ or less"):
        fit(prepared, settings(samples=10**9))
    with pytest.raises(ConfigError, match=r"Set train\.finish_samples to \d+ or less"):
        fit(prepared, settings(finish_epochs=1, finish_samples=10**9))
    small = settings(epochs=1)
    check_memory(fit(prepared, small), small.train)
