"""A training that was ended in the middle goes on as if it had not been."""

import os
import signal
from dataclasses import replace

import keras
import numpy as np
import pytest
from helpers import PLAIN

from vaeflow.config.schema import Parameters
from vaeflow.errors import TrainingError
from vaeflow.model.device import put_on_device
from vaeflow.training import loop
from vaeflow.training.callbacks import StopWhenSkipping
from vaeflow.training.checkpoint import Checkpoints, training_key
from vaeflow.training.loop import fit

# An epoch: 200 images in batches of 10, 8 steps at once on a CPU, or under JAX stacks of 5.
ON_JAX = keras.backend.backend() == "jax"
EXECUTIONS = 4 if ON_JAX else 3

CASES = {
    "plain": {},
    "averaged, binarised, with a flow and a finish": {
        "weight_average": 0.9,
        "binarize": "dynamic",
        "prior": "flow",
        "learning_rate_schedule": "cosine",
        "kl_warmup_epochs": 2,
        "finish_epochs": 2,
        "finish_samples": 3,
    },
    "keeping the best": {"patience": 3, "learning_rate": 0.3, "weight_average": 0.5},
    "keeping the best before a finish": {
        "patience": 1,
        "learning_rate": 0.3,
        "weight_average": 0.5,
        "finish_epochs": 2,
    },
    "on a plateau": {
        "learning_rate": 0.3,
        "learning_rate_schedule": "plateau",
        "plateau_epochs": 1,
    },
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Have JAX, which `test_backends` runs one of these with, work through batches as on a GPU."""
    if ON_JAX:
        monkeypatch.setattr(loop, "choose_batches_at_once", lambda: 8)
        monkeypatch.setattr(loop, "keep_on_device", lambda images: put_on_device(images[:]))


def settings(**train):
    small = {
        **PLAIN,
        "epochs": 6,
        "batch_size": 10,
        "filters": [4],
        "hidden_units": 8,
        "latent_dim": 2,
        **train,
    }
    return Parameters.model_validate({"train": small})


class TerminateAfter(keras.callbacks.Callback):
    """Sends SIGTERM after so many executions of steps, or when so many validations begin."""

    def __init__(self, executions=None, validations=None):
        super().__init__()
        self.executions, self.validations = executions, validations

    def on_train_batch_end(self, batch, logs=None):
        if self.executions is not None:
            self.executions -= 1
            if self.executions == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_test_batch_begin(self, batch, logs=None):
        if self.validations is not None:
            self.validations -= 1
            if self.validations == 0:
                os.kill(os.getpid(), signal.SIGTERM)


def interrupted(prepared, parameters, checkpoints, *terminations):
    """Weights and rows of a training that was ended by each of these and begun again."""
    rows = {}
    keep = {"report": lambda row: rows.setdefault(row["epoch"], row)}
    for termination in terminations:
        with pytest.raises(SystemExit) as ended:
            fit(prepared, parameters, checkpoints=checkpoints, callbacks=[termination], **keep)
        assert ended.value.code == 128 + signal.SIGTERM
    vae = fit(prepared, parameters, checkpoints=checkpoints, **keep)
    return vae.get_weights(), list(rows.values())


@pytest.mark.parametrize("case", CASES)
def test_ended_and_begun_again_it_ends_with_the_same_weights(prepared, tmp_path, case):
    parameters = settings(**CASES[case])
    rows = []
    expected = fit(prepared, parameters, report=rows.append).get_weights()
    got, again = interrupted(
        prepared,
        parameters,
        Checkpoints(tmp_path / "checkpoints"),
        TerminateAfter(executions=1),
        TerminateAfter(executions=EXECUTIONS + 1),
        TerminateAfter(validations=1),
        TerminateAfter(executions=EXECUTIONS),  # the last of an epoch
        TerminateAfter(validations=2),
    )
    assert again == rows
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, other)


def test_steps_left_out_are_too_many_by_the_whole_epoch_not_by_what_is_left_of_it(
    prepared, tmp_path
):
    """Of 20 steps 16 were made before it was ended; then the four that are left are left out."""
    parameters = settings(epochs=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(SystemExit):
        fit(
            prepared,
            parameters,
            checkpoints=checkpoints,
            callbacks=[TerminateAfter(executions=1)],
        )

    class LeaveOut(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.config = replace(self.model.config, gradient_limit=0.0)
            self.model.make_train_function(force=True)

    stop = StopWhenSkipping(100, 20, tmp_path / "model.keras")
    vae = fit(prepared, parameters, checkpoints=checkpoints, callbacks=[LeaveOut(), stop])
    assert int(vae.skipped_in_a_row) == 4


def test_a_training_that_was_finished_is_finished_at_once(prepared, tmp_path):
    parameters = settings(weight_average=0.9, checkpoint_minutes=0.0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    expected = fit(prepared, parameters, checkpoints=checkpoints).get_weights()
    resumed = []
    vae = fit(
        prepared,
        parameters,
        checkpoints=checkpoints,
        resumed=resumed.extend,
        callbacks=[TerminateAfter(executions=1)],  # never comes to that
    )
    assert [row["epoch"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(expected, vae.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_last_two_are_kept_and_the_one_before_stands_in_for_a_damaged_one(
    prepared, tmp_path, capsys
):
    parameters = settings(checkpoint_minutes=0.0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    expected = fit(prepared, parameters, checkpoints=checkpoints).get_weights()
    _, newest = sorted(checkpoints.folder.iterdir())
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    resumed = []
    vae = fit(prepared, parameters, checkpoints=checkpoints, resumed=resumed.extend)
    assert len(resumed) == 5
    assert f"{newest}: damaged; the checkpoint before it is taken" in capsys.readouterr().out
    for one, other in zip(expected, vae.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)

    for path in checkpoints.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert checkpoints.load() is None


def test_any_damage_of_one_byte_is_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"a": np.arange(5)})
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 255]) + content[index + 1 :])
        assert checkpoints.load() is None
    path.write_bytes(content)
    np.testing.assert_array_equal(checkpoints.load()["a"], np.arange(5))


def test_another_parameter_or_other_images_are_another_training(prepared):
    train = settings().train
    key = training_key(prepared, train)
    assert training_key(prepared, settings(checkpoint_minutes=7.0).train) == key
    assert training_key(prepared, settings(epochs=7).train) != key
    (prepared / "index.parquet").write_bytes(b"other images")
    assert training_key(prepared, train) != key


def test_a_checkpoint_that_cannot_be_written_is_a_clear_error_and_those_before_stay(
    prepared, tmp_path
):
    """A file size limit stands for a full disk: both are errors of the write."""
    import resource

    parameters = settings(checkpoint_minutes=0.0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Fill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(TrainingError, match=r"00000004\.checkpoint: File too large.*before"):
            fit(prepared, parameters, checkpoints=checkpoints, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == [
        "00000002.checkpoint",
        "00000003.checkpoint",
    ]
    resumed = []
    fit(prepared, parameters, checkpoints=checkpoints, resumed=resumed.extend)
    assert len(resumed) == 3
