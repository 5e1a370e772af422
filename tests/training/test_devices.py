"""Training on several devices, for which the CPU is split in two."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vaeflow.config.schema import Parameters
from vaeflow.data.batches import Batches
from vaeflow.errors import ConfigError
from vaeflow.training import setup

TRAIN = """
import sys
from pathlib import Path
import vaeflow
import keras, numpy as np
from test_resume import TerminateAfter, settings
from vaeflow.model.device import count_devices
from vaeflow.training.checkpoint import Checkpoints
from vaeflow.training.loop import fit

prepared, checkpoints, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    cpu, = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * devices
    tf.config.set_logical_device_configuration(cpu, parts)
assert count_devices() == devices
unusual = {"gradient_limit": float(sys.argv[4]), "binarize": "dynamic", "weight_average": 0.9}
unusual["jit"] = sys.argv[5] == "xla"
parameters = settings(batch_size=24, epochs=2, **unusual)
try:
    fit(prepared, parameters, checkpoints=Checkpoints(checkpoints), callbacks=[TerminateAfter(2)])
except SystemExit:
    pass
rows = []
vae = fit(prepared, parameters, checkpoints=Checkpoints(checkpoints), report=rows.append)
assert [row["epoch"] for row in rows] == [1, 2]
if keras.backend.backend() == "tensorflow":
    assert vae.jit_replicas == (unusual["jit"] and devices > 1)
np.savez(
    f"{devices}.npz",
    *vae.get_weights(),
    *[row[name] for row in rows for name in sorted(row)],
    skipped=[row["skipped_steps"] for row in rows],
)
"""


def train(prepared, folder, backend, devices, gradient_limit=1000.0, compiler="xla"):
    arguments = [prepared, folder / f"{devices}.checkpoints", devices, gradient_limit, compiler]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *map(str, arguments)],
        cwd=folder,
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / f"{devices}.npz")


@pytest.mark.backends
@pytest.mark.parametrize(
    ("backend", "compiler"),
    [("tensorflow", "none"), ("tensorflow", "xla"), ("jax", "xla")],
    ids=["tensorflow", "tensorflow with XLA", "jax"],
)
def test_two_devices_make_the_steps_of_one(prepared, tmp_path, backend, compiler):
    """The same noise for the same images, the same mean gradient, skipped together or not."""
    if backend == "jax":
        pytest.importorskip("jax", reason="JAX is not installed: pip install 'vaeflow[jax]'")
    # TensorFlow's XLA draws other noise where the whole of a step is its own, as on one device.
    alone = "none" if backend == "tensorflow" else compiler
    one = train(prepared, tmp_path, backend, 1, compiler=alone)
    two = train(prepared, tmp_path, backend, 2, compiler=compiler)
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert not one["skipped"].any()


@pytest.mark.backends
def test_two_devices_leave_the_same_steps_out(prepared, tmp_path):
    skipped = train(prepared, tmp_path, "tensorflow", 2, 1e-9, "none")["skipped"]
    np.testing.assert_array_equal(skipped, 9)


def test_batches_that_devices_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(setup, "count_devices", lambda: 3)
    train = Parameters.model_validate({"train": {"batch_size": 128}}).train
    with pytest.raises(ConfigError, match=r"batch_size is 128, which 3 devices.*Set it to 129"):
        setup.check_devices(train)


def test_the_last_batch_is_filled_up_from_the_front_of_the_epoch(digits):
    data = Batches(digits, 256, shuffle_seed=1, multiple_of=4)
    *whole, last = data.at(2)
    assert last.shape[0] == 8  # 1797 = 7 * 256 + 5
    np.testing.assert_array_equal(last[5:], whole[0][:3])
    assert {len(batch) for batch in whole} == {256}
