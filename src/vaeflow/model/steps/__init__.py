"""What a training step needs of TensorFlow and of JAX, and what only makes it faster."""

from __future__ import annotations

from typing import Any

import keras


def backend() -> Any:
    """Return the functions of Keras's backend that a step is made with.

    Raises:
        ImportError: there are none for this one.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        from vaeflow.model.steps import tensorflow

        return tensorflow
    if name == "jax":
        from vaeflow.model.steps import jax

        return jax
    raise ImportError(f"KERAS_BACKEND is {name}; vaeflow trains with tensorflow or jax.")
