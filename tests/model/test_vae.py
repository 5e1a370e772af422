import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from vaeflow.config.model import VAEConfig
from vaeflow.errors import BundleError
from vaeflow.model.likelihoods import LIKELIHOODS
from vaeflow.model.networks import level_sizes
from vaeflow.model.vae import VAE, load_vae


def small_vae(image_shape=(8, 8, 1), name=None, **options):
    settings = {"latent_dim": 3, "filters": (4, 6), "hidden_units": 16, **options}
    return VAE(VAEConfig(image_shape=image_shape, **settings), name=name)


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


@pytest.fixture
def images(digits):
    return digits[:256].astype(np.float32) / 255


def test_a_skipped_step_leaves_the_other_steps_metrics_alone(images):
    vae = small_vae()
    vae.compile(optimizer=keras.optimizers.SGD(0.0))
    damaged = images.copy()
    damaged[64:128] = np.nan
    history = vae.fit(damaged, batch_size=64, shuffle=False, verbose=0).history
    assert history["skipped_steps"] == [1]
    sound = np.concatenate([images[:64], images[128:]])
    expected = vae.evaluate(sound, batch_size=64, verbose=0, return_dict=True)
    assert history["kl"][0] == pytest.approx(expected["kl"], rel=1e-4)
    assert history["elbo"][0] == pytest.approx(expected["elbo"], rel=0.01)


@pytest.mark.parametrize(
    "image_shape", [(8, 8, 1), (28, 28, 1), (7, 5, 3), (1, 1, 1), (9, 33, 2), (128, 96, 3)]
)
@pytest.mark.parametrize("filters", [(4,), (4, 6, 8)])
@pytest.mark.parametrize(("network", "depth"), [("conv", 1), ("conv", 2), ("residual", 1)])
def test_any_image_shape_comes_back(image_shape, filters, network, depth):
    vae = small_vae(image_shape, filters=filters, network=network, depth=depth)
    outputs = vae(np.random.default_rng(0).random((2, *image_shape), dtype=np.float32))
    assert outputs["mean"].shape == outputs["log_variance"].shape == (2, 3)
    assert outputs["reconstruction"].shape == (2, *image_shape)
    assert float(np.min(outputs["reconstruction"])) >= 0
    assert float(np.max(outputs["reconstruction"])) <= 1


def test_depth_and_filters_make_the_networks():
    """Counted by hand: a 3x3 convolution from a to b channels has 9 a b + b weights."""

    def weights(layers):
        return sum(weight.shape.num_elements() for layer in layers for weight in layer.weights)

    def convolution(a, b):
        return 9 * a * b + b

    conv = small_vae(depth=2)
    downs = [layer for layer in conv.encoder.layers if layer.name.startswith("down")]
    expected = convolution(1, 4) + convolution(4, 4) + convolution(4, 6) + convolution(6, 6)
    assert weights(downs) == expected

    residual = small_vae(network="residual", depth=3)
    blocks = [layer for layer in residual.encoder.layers if "_block_" in layer.name]
    assert weights(blocks) == 3 * 2 * (2 * convolution(4, 4) + convolution(6, 6))


def test_residual_blocks_begin_as_the_identity(images):
    shallow, deep = (small_vae(network="residual", depth=depth) for depth in (1, 4))
    for network in ("encoder", "decoder"):
        kept = {layer.name: layer for layer in getattr(shallow, network).layers if layer.weights}
        for layer in getattr(deep, network).layers:
            if layer.name in kept:
                layer.set_weights(kept[layer.name].get_weights())
    np.testing.assert_allclose(
        deep(images)["reconstruction"], shallow(images)["reconstruction"], atol=1e-6
    )


def test_each_level_halves_rounding_up():
    assert level_sizes(28, 3) == [28, 14, 7, 4]
    assert level_sizes(1, 2) == [1, 1, 1]


def test_fit_raises_the_elbo_and_evaluate_and_predict_work(images):
    vae = small_vae()
    vae.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = vae.fit(images, validation_data=images[:64], batch_size=32, epochs=4, verbose=0)
    elbo = history.history["elbo"]
    assert elbo[-1] > elbo[0] + 3
    assert history.history["skipped_steps"] == [0, 0, 0, 0]

    results = vae.evaluate(images, batch_size=64, verbose=0, return_dict=True)
    assert results["elbo"] == pytest.approx(results["log_likelihood"] - results["kl"], rel=1e-5)
    assert results["loss"] == pytest.approx(-results["elbo"])
    again = vae.evaluate(images, batch_size=64, verbose=0, return_dict=True)
    assert again == results

    predicted = vae.predict(images, verbose=0)
    np.testing.assert_array_equal(predicted["mean"], vae.predict(images, verbose=0)["mean"])


def test_train_step_applies_the_gradient_of_the_mean_elbo(images):
    """One step of plain gradient ascent, against the same objective differentiated by hand."""
    vae = small_vae(seed=5)
    vae.compile(optimizer=keras.optimizers.SGD(1.0))
    noise = keras.random.normal((len(images), 3), seed=keras.random.SeedGenerator(5))
    before = [tf.identity(weight) for weight in vae.trainable_variables]
    with tf.GradientTape() as tape:
        posterior = vae.encoder(images)
        latents = posterior["mean"] + tf.exp(posterior["log_variance"] / 2) * noise
        logits = vae.decoder(latents)["logits"]
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(images, logits)
        kl = 0.5 * (
            tf.exp(posterior["log_variance"])
            + posterior["mean"] ** 2
            - 1
            - posterior["log_variance"]
        )
        loss = (tf.reduce_sum(cross_entropy) + tf.reduce_sum(kl)) / len(images)
    gradients = tape.gradient(loss, [w.value for w in vae.trainable_variables])
    vae.train_on_batch(images)
    for weight, start, gradient in zip(vae.trainable_variables, before, gradients, strict=True):
        np.testing.assert_allclose(start - weight, gradient, rtol=2e-3, atol=2e-5)


def test_mini_batch_gradients_average_to_the_full_batch(images):
    """The N/M normalisation: equal batches of any size estimate the same gradient."""
    vae = small_vae()
    noise = np.random.default_rng(0).standard_normal((2, len(images), 3)).astype(np.float32)

    def gradient(rows):
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(vae.terms(images[rows], noise[:, rows]).elbo)
        return tape.gradient(loss, [w.value for w in vae.trainable_variables])

    whole = gradient(slice(None))
    parts = [gradient(slice(start, start + 64)) for start in range(0, 256, 64)]
    for full, *pieces in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(full, np.mean(pieces, axis=0), rtol=1e-3, atol=1e-5)


def test_importance_weighted_step_equals_the_squared_weights_form(images):
    """DReG as Tucker et al. 2019 write it, with a pass for each network."""
    vae = small_vae(seed=5, objective="importance_weighted", samples=4)
    vae.compile(optimizer=keras.optimizers.SGD(1.0))
    noise = keras.random.normal((4, len(images), 3), seed=keras.random.SeedGenerator(5))
    before = [tf.identity(weight) for weight in vae.trainable_variables]

    def log_weights():
        posterior = vae.encoder(images)
        mean, deviation = posterior["mean"], tf.exp(posterior["log_variance"] / 2)
        latents = mean + deviation * noise
        logits = tf.reshape(vae.decoder(tf.reshape(latents, (-1, 3)))["logits"], (4, -1, 8, 8, 1))
        target = tf.broadcast_to(images, logits.shape)
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(target, logits)
        mean, deviation = tf.stop_gradient(mean), tf.stop_gradient(deviation)
        log_ratio = -0.5 * latents**2 + 0.5 * ((latents - mean) / deviation) ** 2
        log_ratio += tf.math.log(deviation)
        return tf.reduce_sum(log_ratio, -1) - tf.reduce_sum(cross_entropy, (2, 3, 4))

    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(tf.reduce_logsumexp(log_weights(), axis=0))
    decoder = tape.gradient(loss, [w.value for w in vae.decoder.trainable_variables])
    with tf.GradientTape() as tape:
        values = log_weights()
        squared = tf.stop_gradient(tf.nn.softmax(values, axis=0) ** 2)
        loss = -tf.reduce_mean(tf.reduce_sum(squared * values, axis=0))
    encoder = tape.gradient(loss, [w.value for w in vae.encoder.trainable_variables])
    vae.train_on_batch(images)
    gradients = [*encoder, *decoder]
    for weight, start, gradient in zip(vae.trainable_variables, before, gradients, strict=True):
        np.testing.assert_allclose(start - weight, gradient, rtol=5e-3, atol=5e-5)


def test_the_kl_term_is_warmed_up_step_by_step(images):
    vae = small_vae(beta=2.0, kl_warmup_steps=4)
    vae.compile(optimizer=keras.optimizers.SGD(0.0))
    for weight in (0.5, 1.0, 1.5, 2.0, 2.0):
        vae.reset_metrics()
        results = vae.train_on_batch(images, return_dict=True)
        expected = weight * results["kl"] - results["log_likelihood"]
        assert results["loss"] == pytest.approx(expected, rel=1e-5)
    results = vae.evaluate(images, batch_size=64, verbose=0, return_dict=True)
    assert results["loss"] == pytest.approx(2 * results["kl"] - results["log_likelihood"], rel=1e-5)


def test_free_bits_leave_a_dimension_alone_until_it_costs_more(images):
    vae = small_vae(free_bits=100.0)
    vae.compile(optimizer=keras.optimizers.SGD(0.0))
    results = vae.train_on_batch(images, return_dict=True)
    assert results["loss"] == pytest.approx(300 - results["log_likelihood"], rel=1e-5)
    assert results["elbo"] == pytest.approx(results["log_likelihood"] - results["kl"], rel=1e-5)


def test_more_samples_tighten_the_trained_bound_only_where_they_are_weighted(images):
    noisy = {}
    for name in ("elbo", "importance_weighted"):
        keras.utils.set_random_seed(0)
        vae = small_vae(objective=name, samples=50)
        vae.compile(optimizer="adam")
        vae.fit(images, batch_size=64, epochs=2, verbose=0)
        noisy[name] = vae.evaluate(images, batch_size=64, verbose=0, return_dict=True)
    assert noisy["elbo"]["loss"] == pytest.approx(-noisy["elbo"]["elbo"], rel=1e-5)
    assert -noisy["importance_weighted"]["loss"] > noisy["importance_weighted"]["elbo"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"objective": "iwae"}, "importance_weighted"),
        ({"network": "mlp"}, "residual"),
        ({"likelihood": "poisson"}, "discretized_logistic"),
        ({"binarize": "once"}, "static"),
        ({"likelihood": "gaussian", "binarize": "static"}, "needs likelihood: bernoulli"),
        ({"objective": "importance_weighted", "free_bits": 0.1}, "choose objective: elbo"),
    ],
)
def test_what_does_not_exist_or_go_together_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        small_vae(**options)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_is_learned_and_comes_back(likelihood, images, tmp_path):
    vae = small_vae(likelihood=likelihood, samples=2)
    vae.compile(optimizer=keras.optimizers.Adam(3e-3))
    elbo = vae.fit(images, batch_size=32, epochs=4, verbose=0).history["elbo"]
    assert elbo[-1] > elbo[0] + 3
    reconstruction = vae.predict(images, verbose=0)["reconstruction"]
    assert reconstruction.min() >= 0
    assert reconstruction.max() <= 1
    np.testing.assert_allclose(reconstruction.mean(), images.mean(), atol=0.1)
    vae.save(tmp_path / "model.keras")
    again = load_vae(tmp_path / "model.keras").predict(images, verbose=0)
    np.testing.assert_allclose(again["reconstruction"], reconstruction, atol=1e-6)


def test_gaussian_pixels_have_one_learned_scale_a_channel():
    vae = small_vae((9, 7, 3), likelihood="gaussian")
    decoded = vae.decoder(np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32))
    assert decoded["mean"].shape == (4, 9, 7, 3)
    assert decoded["log_scale"].shape == (4, 1, 1, 3)
    assert np.ptp(decoded["log_scale"], axis=0).max() == 0
    (values,) = vae.decoder.get_layer("log_scale").trainable_variables
    assert values.shape == (3,)


@pytest.mark.parametrize("network", ["encoder", "decoder"])
def test_each_network_can_be_saved_by_itself(network, tmp_path):
    kept = getattr(small_vae((9, 7, 3), likelihood="gaussian"), network)
    kept.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras", safe_mode=True)
    inputs = np.random.default_rng(0).random((2, *kept.input_shape[1:]), dtype=np.float32)
    for name, values in kept(inputs).items():
        np.testing.assert_array_equal(loaded(inputs)[name], values)


def test_dynamic_binarisation_draws_anew_in_every_step():
    """At lr 0 and with decoder weights at 0, log p is -pixels log 2 whatever the draw: use a bias.

    With logits b everywhere, log p = b * (white pixels) + constant counts the white pixels.
    """
    vae = small_vae(binarize="dynamic")
    head = vae.decoder.get_layer("logits")
    head.set_weights([np.zeros_like(head.kernel), np.ones_like(head.bias)])
    vae.compile(optimizer=keras.optimizers.SGD(0.0))
    grey = np.full((256, 8, 8, 1), 0.3, np.float32)
    white = []
    for _ in range(2):
        vae.reset_metrics()
        log_likelihood = vae.train_on_batch(grey, return_dict=True)["log_likelihood"]
        white.append((log_likelihood + 64 * np.log1p(np.e)) / 64)
    assert white[0] != white[1]
    scatter = np.sqrt(0.3 * 0.7 / (256 * 64))
    assert white == pytest.approx([0.3, 0.3], abs=4 * scatter)


def test_log_variance_stays_within_bounds_whatever_the_weights(images):
    vae = small_vae()
    head = vae.encoder.get_layer("log_variance")
    for scale in (1e4, -1e4):
        head.set_weights([np.zeros_like(head.kernel), np.full_like(head.bias, scale)])
        outputs = vae.encoder(images)
        np.testing.assert_allclose(outputs["log_variance"], np.sign(scale) * 12, rtol=1e-5)
    small = np.linspace(-1, 1, 3)
    head.set_weights([np.zeros_like(head.kernel), small])
    np.testing.assert_allclose(vae.encoder(images[:1])["log_variance"][0], small, atol=0.01)


def test_a_step_that_is_not_finite_is_skipped_and_counted(images):
    vae = small_vae()
    vae.compile(optimizer="adam")
    vae.fit(images, batch_size=64, verbose=0)
    before = [weight.numpy() for weight in vae.trainable_variables]
    moments = [variable.numpy() for variable in vae.optimizer.variables]
    results = vae.train_on_batch(np.full_like(images, np.nan), return_dict=True)
    assert results["skipped_steps"] == 1
    for value, weight in zip(before, vae.trainable_variables, strict=True):
        np.testing.assert_array_equal(value, weight)
    for value, variable in zip(moments, vae.optimizer.variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_a_gradient_above_the_limit_is_skipped_and_counted_until_a_step_is_made(images):
    """SGD with rate 1 moves by the gradient, which tells its norm."""
    keras.utils.set_random_seed(0)
    vae = small_vae(seed=5)
    vae.compile(optimizer=keras.optimizers.SGD(1.0))
    start = [weight.numpy() for weight in vae.trainable_variables]
    vae.train_on_batch(images)
    moved = [a - b for a, b in zip(start, vae.trainable_variables, strict=True)]
    norm = np.sqrt(sum(np.sum(np.square(step)) for step in moved)) / 64
    for factor, skipped in ((0.99, 1), (1.01, 0)):
        limited = small_vae(seed=5, gradient_limit=float(norm * factor))
        for weight, value in zip(limited.trainable_variables, start, strict=True):
            weight.assign(value)
        limited.compile(optimizer=keras.optimizers.SGD(1.0))
        assert limited.train_on_batch(images, return_dict=True)["skipped_steps"] == skipped
        assert float(limited.skipped_in_a_row) == skipped
    vae.train_on_batch(np.full_like(images, np.nan))
    vae.train_on_batch(np.full_like(images, np.nan))
    assert float(vae.skipped_in_a_row) == 2
    vae.train_on_batch(images)
    assert float(vae.skipped_in_a_row) == 0
    assert float(vae.steps) == 4


def test_same_seed_same_weights(images):
    def weights():
        keras.utils.set_random_seed(3)
        vae = small_vae(seed=3)
        vae.compile(optimizer="adam")
        vae.fit(images, batch_size=64, epochs=2, verbose=0)
        return vae.get_weights()

    for first, second in zip(weights(), weights(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_config_holds_every_constructor_value():
    vae = small_vae(
        (9, 7, 2),
        network="residual",
        depth=2,
        gradient_limit=5.0,
        likelihood="gaussian",
        prior="flow",
        prior_couplings=2,
        objective="importance_weighted",
        samples=3,
        beta=0.5,
        kl_warmup_steps=7,
        seed=4,
        name="mine",
    )
    copy = VAE.from_config(vae.get_config())
    assert copy.get_config() == vae.get_config()
    assert {"objective", "samples", "beta", "kl_warmup_steps", "free_bits"} <= set(vae.get_config())
    assert [w.shape for w in copy.weights] == [w.shape for w in vae.weights]


FRESH = """
import sys
import numpy as np
from vaeflow.model.vae import load_vae

vae = load_vae(sys.argv[1])
images = np.load(sys.argv[2])
results = vae.evaluate(images, batch_size=64, verbose=0, return_dict=True)
steps = int(vae.optimizer.iterations)
np.savez(sys.argv[3], **vae.predict(images, verbose=0), elbo=results["elbo"], steps=steps)
"""


def test_a_saved_model_gives_the_same_numbers_in_a_fresh_process(images, tmp_path):
    vae = small_vae()
    vae.compile(optimizer="adam")
    vae.fit(images, batch_size=64, verbose=0)
    vae.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    paths = [str(tmp_path / name) for name in ("model.keras", "images.npy", "out.npz")]
    subprocess.run([sys.executable, "-c", FRESH, *paths], check=True)

    fresh = np.load(tmp_path / "out.npz")
    here = vae.predict(images, verbose=0)
    for name, values in here.items():
        np.testing.assert_allclose(fresh[name], values, rtol=0, atol=1e-6)
    results = vae.evaluate(images, batch_size=64, verbose=0, return_dict=True)
    assert float(fresh["elbo"]) == pytest.approx(results["elbo"], rel=1e-6)
    assert int(fresh["steps"]) == 4  # the optimizer's state was saved too


def test_a_learned_prior_comes_back_with_its_optimizer(images, tmp_path):
    vae = small_vae(prior="flow")
    vae.compile(optimizer="adam")
    vae.fit(images, batch_size=64, verbose=0)
    vae.save(tmp_path / "model.keras")
    copy = load_vae(tmp_path / "model.keras")
    assert np.abs(vae.prior.bias.numpy()).max() > 0
    for ours, theirs in zip(copy.weights, vae.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(copy.optimizer.iterations) == 4
    ours, theirs = (model.evaluate(images, batch_size=64, verbose=0) for model in (copy, vae))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_what_is_no_vae_is_refused(tmp_path):
    (tmp_path / "text.keras").write_text("hello")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "other.keras")
    for name in ("text.keras", "other.keras", "absent.keras"):
        with pytest.raises(BundleError, match=name):
            load_vae(tmp_path / name)
