"""Where Keras's backend computes: on accelerators where it sees any, else on the CPU."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vaeflow.common.files import cache_folder
from vaeflow.common.processes import cores
from vaeflow.errors import ConfigError

KEPT_BYTES = 2**30
# Cores that share a batch, and images of it for each.
MOST_PARTS, LEAST_IMAGES = 4, 16
# XLA's flag: operations whose result depends on what comes first are compiled to others.
REPRODUCIBLE = "--xla_gpu_exclude_nondeterministic_ops=true"
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX"}


def keras_backend() -> str:
    """Return the backend that Keras will be imported with.

    Raises:
        ConfigError: models cannot be trained with it.
    """
    settings = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "keras.json"
    source, name = "KERAS_BACKEND", os.environ.get("KERAS_BACKEND")
    if not name:
        source, name = f'"backend" in {settings}', "tensorflow"
        with suppress(OSError, ValueError, AttributeError):
            name = json.loads(settings.read_text()).get("backend", name)
    if name not in NAMES:
        raise ConfigError(f"{source} is {name}; vaeflow trains with tensorflow or jax. Name one.")
    return name


def use_gpu_if_any() -> str:
    """Use the GPUs that are seen, reproducibly, under TensorFlow with only the memory it needs.

    Call it before anything is computed: what makes XLA reproducible is read then, and not again.
    Programs that JAX compiles for a GPU are kept in `VAEFLOW_CACHE`. A training that goes on later
    is made by the same ones then, while a fresh compilation may time kernels anew and choose others
    that round otherwise.

    Returns:
        What is used, in words.
    """
    if _backend() == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_op_determinism()
    else:
        flags = os.environ.get("XLA_FLAGS", "")
        if REPRODUCIBLE.split("=")[0] not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {REPRODUCIBLE}".strip()
    accelerators = _accelerators()
    if accelerators and _backend() == "jax":
        _keep_programs()
    if not accelerators:
        return f"the CPU ({NAMES[_backend()]} sees no GPU)"
    several = f"{len(accelerators)} of " * (len(accelerators) > 1)
    return f"GPU: {several}{accelerators[0]}"


def share_cores(batch_size: int, jit: bool) -> int:
    """Have every core of the CPU work on a part of each batch, where that is faster.

    One operation after the other, shared by all cores, has them wait for one another hundreds of
    times a step. A part of a batch, with all its operations, is a core's own. Each makes a gradient
    in all the weights, though, and more cores than a few are held up by the memory of these.

    Call it before anything is computed: only then can TensorFlow be told.

    Args:
        batch_size: images of a batch.
        jit: whether XLA compiles steps, each to one program, which has no parts.

    Returns:
        In how many parts to take a batch; 1 under XLA, JAX, on accelerators and on many cores.
    """
    if jit or _backend() != "tensorflow" or has_gpu():
        return 1
    import tensorflow as tf

    parts = cores()
    if parts > MOST_PARTS or batch_size < LEAST_IMAGES * parts or _is_split(tf):
        return 1
    with suppress(RuntimeError):  # it computes already: its operations go on sharing the cores
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return parts


def _keep_programs() -> None:
    """Have JAX keep what it compiles, unless it has been told where by its own settings."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))


def has_gpu() -> bool:
    """Return whether a GPU, or another accelerator, is seen."""
    return bool(_accelerators())


def choose_jit(setting: str | bool) -> bool:
    """Decide whether to compile steps with XLA, as `train.jit` says.

    `auto` does under JAX, which knows no other way of being fast, and on GPUs; on CPUs TensorFlow's
    own kernels are faster.
    """
    return has_gpu() or _backend() == "jax" if isinstance(setting, str) else setting


def has_replicas() -> bool:
    """Return whether TensorFlow trains copies of the model, each on a device of its own.

    XLA makes no program of a step over several devices then, and each replica has its own.
    """
    return _backend() == "tensorflow" and count_devices() > 1


def choose_steps_per_execution() -> int:
    """Choose how many steps to make before signals are looked at: about half a second of them.

    Between two calls of the program's own, TensorFlow spends 2 ms, which on a GPU is more than a
    step; but a training that is told to end does so only between them. JAX gets batches stacked
    instead, see `choose_batches_at_once`: Keras would call it as often as before.
    """
    if _backend() == "jax" or count_devices() > 1:
        return 1  # more at once TensorFlow fails to make on several devices (2.21)
    return 32 if has_gpu() else 8


def choose_batches_at_once() -> int:
    """Choose how many batches JAX is to work through as one program; see `data.batches.Batches`."""
    if _backend() == "tensorflow" or count_devices() > 1:
        return 1  # several devices share what comes along its first axis
    return 64 if has_gpu() else 1  # XLA's loops are slower than its steps on a CPU


def keep_on_device(images: Any) -> Any:
    """Copy images to the only accelerator, up to 1 GiB; otherwise return them as given.

    Args:
        images: uint8, `(count, height, width, channels)`; an array, or what stands in for one.
    """
    if not has_gpu() or count_devices() > 1 or math.prod(images.shape) > KEPT_BYTES:
        return images
    return put_on_device(images[:])


def put_on_device(images: Any) -> Any:
    """Copy images to the first device; to the CPU, where there is no other."""
    if _backend() == "tensorflow":
        import tensorflow as tf

        with tf.device(_devices()[0].name):
            return tf.identity(images)
    import jax

    # Not bound to that device by name: what is computed from it would be too, and programs that
    # had been compiled for unbound weights would be compiled once more for these.
    return jax.device_put(images)


@contextmanager
def layers_in(setting: str) -> Iterator[None]:
    """Let layers that are made inside compute as `train.precision` says; weights stay float32."""
    import keras

    before = keras.config.dtype_policy()
    if setting == "auto":
        setting = "mixed_bfloat16" if has_gpu() else "float32"
    keras.config.set_dtype_policy(setting)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def count_devices() -> int:
    """Return how many devices `all_devices` trains on, those of other hosts too."""
    if _backend() == "tensorflow":
        return len(_devices())
    import jax

    return int(jax.device_count())


@contextmanager
def all_devices() -> Iterator[None]:
    """Let models made inside train on every device, each with its part of a batch.

    Those are the GPUs, or the CPUs into which a machine without any has been split; under JAX those
    of all processes that train together (see `vaeflow.model.hosts`).
    """
    if count_devices() == 1:
        yield
    elif _backend() == "tensorflow":
        import tensorflow as tf

        with tf.distribute.MirroredStrategy([device.name for device in _devices()]).scope():
            yield
    else:
        import keras

        # Each process reads its own part: see `vaeflow.data.batches.Batches`.
        with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
            yield


def use_cpu() -> None:
    """Hide GPUs: exports are compared to 1e-4, which a GPU's TF32 products do not keep."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")


def use_full_precision() -> None:
    """Multiply in float32 on GPUs too, which by default round to TF32: bounds are compared."""
    if _backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
    else:
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")


def _backend() -> str:
    import keras

    return keras.backend.backend()


def _accelerators() -> list[str]:
    """Return the kind of each accelerator; ask nothing that would fix what may still be set."""
    if _backend() == "tensorflow":
        import tensorflow as tf

        return [
            tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
            for gpu in tf.config.list_physical_devices("GPU")
        ]
    import jax

    return [device.device_kind for device in jax.local_devices() if device.platform != "cpu"]


def _is_split(tf: Any) -> bool:
    """Return whether the CPU is split into devices; counting them would start TensorFlow."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    return len(tf.config.get_logical_device_configuration(cpu) or [cpu]) > 1


def _devices() -> list[Any]:
    if _backend() == "tensorflow":
        import tensorflow as tf

        return tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    import jax

    return jax.local_devices()
