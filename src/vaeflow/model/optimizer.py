"""The optimizer that trainings use."""

from __future__ import annotations

import math

import keras
from keras import ops

from vaeflow.model.backend import backend


@keras.saving.register_keras_serializable(package="vaeflow")
class Adam(keras.optimizers.Adam):
    """Keras's Adam, whose steps take less time on CPUs under TensorFlow.

    A step is dozens of small operations on every weight, each a pass over the memory of all of
    them. Here it is one pass, and two cores each make half of it.

    The two methods are Keras's own, and called by it. Should it call others one day, the steps will
    be right, and slower.
    """

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        def update(half):
            gradients, variables = zip(*half, strict=True)
            update_all(gradients, variables, learning_rate)

        update_all = super()._backend_update_step
        for half in _halves(list(zip(grads, trainable_variables, strict=True))):
            backend().in_one_pass(lambda half=half: update(half))

    def _update_model_variables_moving_average(self, trainable_variables):
        def update(half):
            # The average begins with what the first step has made of the weights.
            momentum = ops.where(ops.equal(self.iterations, 0), 0.0, self.ema_momentum)
            for average, variable in half:
                average.assign(momentum * average + (1.0 - momentum) * variable)

        averages = self._model_variables_moving_average
        for half in _halves(list(zip(averages, trainable_variables, strict=True))):
            backend().in_one_pass(lambda half=half: update(half))


def _halves(pairs):
    """Pairs, whose second is a variable, as two lists of about as many weights."""
    pairs = sorted(pairs, key=lambda pair: math.prod(pair[1].shape), reverse=True)
    halves, sizes = ([], []), [0, 0]
    for pair in pairs:
        smaller = sizes.index(min(sizes))
        halves[smaller].append(pair)
        sizes[smaller] += math.prod(pair[1].shape)
    return [half for half in halves if half]
