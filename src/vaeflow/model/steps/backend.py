"""Keras's backend, as training needs it beyond what Keras itself offers."""

import keras


def backend():
    """The functions of Keras's backend that a step is made with.

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
