"""Where TensorFlow computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def use_gpu_if_any() -> str:
    """Take a GPU when TensorFlow sees one, reproducibly, and only as much memory as is needed.

    Returns:
        What is used, in words.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_op_determinism()
    if not gpus:
        return "the CPU (TensorFlow sees no GPU)"
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus]
    return f"GPU: {names[0]}" + (f" (of {len(gpus)} seen)" if len(gpus) > 1 else "")


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def choose_jit(setting: str | bool) -> bool:
    """Whether to compile steps with XLA, as `train.jit` says."""
    return has_gpu() if setting == "auto" else setting


@contextmanager
def layers_in(setting: str) -> Iterator[None]:
    """Layers made inside compute as `train.precision` says; their weights are float32 anyway."""
    import keras

    before = keras.config.dtype_policy()
    if setting == "auto":
        setting = "mixed_bfloat16" if has_gpu() else "float32"
    keras.config.set_dtype_policy(setting)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def use_cpu() -> None:
    """Leave GPUs alone: exports are compared to 1e-4, which a GPU's TF32 products do not keep."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")


def use_full_precision() -> None:
    """Multiply in float32 on GPUs too, which by default round to TF32: bounds are compared."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
