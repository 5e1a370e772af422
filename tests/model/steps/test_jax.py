"""What a GPU needs of JAX's programs, as far as a CPU shows it; run by `test_backends`."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from vaeflow.config.model import VAEConfig
from vaeflow.data.batches import Batches
from vaeflow.model import device
from vaeflow.model.steps.optimizer import Adam
from vaeflow.model.vae import VAE

if keras.backend.backend() != "jax":
    pytest.skip("for KERAS_BACKEND=jax; test_backends runs them", allow_module_level=True)
import jax

SIZE, STEPS = 64, 7


def model():
    """One that is compiled, with all that a step can have."""
    keras.utils.set_random_seed(0)
    config = VAEConfig((8, 8, 1), latent_dim=2, filters=(4, 6), hidden_units=8, binarize="dynamic")
    vae = VAE(config)
    vae.compile(optimizer=Adam(0.01, use_ema=True, ema_momentum=0.5), jit_compile=True)
    vae.optimizer.build(vae.trainable_variables)
    return vae


def state_of(vae):
    groups = (vae.trainable_variables, vae.non_trainable_variables)
    groups += (vae.optimizer.variables, vae.metrics_variables)
    return tuple([jax.numpy.copy(variable.value) for variable in group] for group in groups)


@pytest.fixture(scope="module")
def program(digits):
    """The compiled steps of a stack, and the stack."""
    vae = model()
    batches = Batches(device.put_on_device(digits), SIZE, shuffle_seed=0, at_once=STEPS)
    step = jax.jit(vae.train_step, donate_argnums=0)
    return step.lower(state_of(vae), batches[0]).compile(), batches[0], state_of(vae)


@pytest.mark.parametrize("kept", [False, True])
def test_stacked_batches_make_the_steps_of_single_ones(digits, kept):
    weights = []
    for at_once in (1, STEPS):
        vae = model()
        images = device.put_on_device(digits) if kept else digits
        batches = Batches(images, SIZE, shuffle_seed=1, at_once=at_once)
        history = vae.fit(batches, shuffle=False, verbose=0).history
        evaluated = vae.evaluate(batches.at(0), verbose=0, return_dict=True)
        values = [variable.numpy().ravel() for variable in vae.trainable_variables]
        weights.append(np.concatenate([*values, *history.values(), list(evaluated.values())]))
        assert int(vae.steps) == 29
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_an_epoch_is_a_handful_of_executions_compiled_once(digits):
    """4 stacks of 7 and the last images, in two programs; later epochs compile nothing."""
    vae, ended, compiled = model(), [], []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ended.append(1))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    batches = Batches(device.put_on_device(digits), SIZE, shuffle_seed=0, at_once=8)
    for epoch in range(3):
        if epoch == 2:  # the first also compiles what sets the metrics back, the second what
            compiled.clear()  # averages the weights
        vae.fit(batches.at(epoch), shuffle=False, callbacks=[count], verbose=0)
        for variable in vae.trainable_variables:  # which Keras has share memory with the averages
            variable.assign(jax.numpy.copy(variable.value))
    assert len(ended) == 3 * 5
    assert not compiled


def test_the_steps_of_a_stack_are_one_loop_that_never_leaves_the_device(program):
    compiled, data, state = program
    text = compiled.as_text()
    assert f'"known_trip_count":{{"n":"{STEPS}"}}' in text
    assert not re.search(r"infeed|outfeed|\bsend\(|\brecv\(|callback", text)
    with jax.transfer_guard("disallow"):
        logs, _ = compiled(state, jax.device_put(data))
    assert np.isfinite(float(logs["loss"]))


def test_the_images_are_no_constant_of_the_program(program, digits):
    text = program[0].as_text()
    shape = "u8" + str(list(digits.shape)).replace(" ", "")
    assert re.search(re.escape(shape) + r"\S* parameter\(", text)
    assert not re.search(re.escape(shape) + r"\S* constant\(", text)


def test_all_that_steps_change_is_changed_in_place(program):
    compiled, _, state = program
    aliases = re.search(r"input_output_alias=\{(.*?\)) \}", compiled.as_text()).group(1)
    leaves = jax.tree.leaves(state)
    assert aliases.count("alias)") == len(leaves)
    # Nor is a matrix kept, in the loop, as it was before the step, for one that is left out.
    matrices = {str(list(leaf.shape)).replace(" ", "") for leaf in leaves if leaf.ndim == 2}
    copied = re.findall(r"= f32(\[\d+,\d+\])\S* copy\(%get-tuple-element", compiled.as_text())
    assert not matrices & set(copied)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in leaves)


KEEP = """
import logging
import vaeflow
from vaeflow.model import device
device._accelerators = lambda: ["a GPU"]
assert device.use_gpu_if_any() == "GPU: a GPU"
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
logging.basicConfig()
jax.jit(lambda x: 3 * x + 1)(jax.numpy.ones(3))
print(device.os.environ["XLA_FLAGS"])
"""


def test_programs_for_a_gpu_are_kept(tmp_path):
    env = {**os.environ, "VAEFLOW_CACHE": str(tmp_path), "XLA_FLAGS": "--xla_dump_to="}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # of these tests
    hits = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", KEEP],
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.stdout.strip() == f"--xla_dump_to= {device.REPRODUCIBLE}", done.stderr
        hits.append("CACHE HIT for 'jit__lambda'".lower() in done.stderr.lower())
    assert hits == [False, True]
    assert list((tmp_path / "programs").iterdir())
