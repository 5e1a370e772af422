"""The optimizer that trainings use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
from keras import ops

from vaeflow.model.objective import Tensor
from vaeflow.model.steps import backend


@keras.saving.register_keras_serializable(package="vaeflow")
class Adam(keras.optimizers.Adam):
    """Keras's Adam, whose steps take less time on CPUs under TensorFlow.

    Its average of the weights, where it keeps one, forgets what training began with.

    A step is dozens of small operations on every weight, each a pass over the memory of all of
    them. Here it is one pass, and two cores each make half of it.

    The two methods are Keras's own, and called by it. Should it call others one day, the steps will
    be right, and slower.
    """

    def _backend_update_step(
        self, grads: list[Tensor], trainable_variables: list[keras.Variable], learning_rate: Tensor
    ) -> None:
        update = super()._backend_update_step
        _in_halves(
            lambda gradients, variables: update(gradients, variables, learning_rate),
            grads,
            trainable_variables,
        )

    def _update_model_variables_moving_average(
        self, trainable_variables: list[keras.Variable]
    ) -> None:
        def update(averages: Sequence[keras.Variable], variables: Sequence[keras.Variable]) -> None:
            # The average begins with what the first step has made of the weights, and reaches back
            # over a tenth of the steps made, until that is as far as it is to reach: in a short
            # training the first weights would otherwise be most of it.
            made = ops.cast(self.iterations, "float32")
            momentum = ops.minimum(self.ema_momentum, made / (made + 10.0))
            for average, variable in zip(averages, variables, strict=True):
                average.assign(momentum * average + (1.0 - momentum) * variable)

        _in_halves(update, self._model_variables_moving_average, trainable_variables)


def _in_halves(
    update: Callable[..., None], values: Sequence[Any], variables: Sequence[keras.Variable]
) -> None:
    """Call a function of values and their variables for two halves of about as many weights."""
    pairs = zip(values, variables, strict=True)
    halves: tuple[list[Any], list[Any]] = ([], [])
    sizes = [0, 0]
    for pair in sorted(pairs, key=lambda pair: math.prod(pair[1].shape), reverse=True):
        smaller = sizes.index(min(sizes))
        halves[smaller].append(pair)
        sizes[smaller] += math.prod(pair[1].shape)
    for half in filter(None, halves):
        backend().in_one_pass(partial(update, *zip(*half, strict=True)))
