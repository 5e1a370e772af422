"""What a training step needs of TensorFlow: gradients, and a step that can be left out.

`jax` beside it has the same functions for JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from vaeflow.model import objective
from vaeflow.model.device import has_gpu
from vaeflow.model.objective import Tensor, Terms


def run(vae: keras.Model, step: Callable[[Any], dict[str, Tensor]], data: Any) -> Any:
    """Make a step on a batch; TensorFlow changes variables in place."""
    return step(data)


def compiled(
    vae: keras.Model,
    function: Callable[..., Any],
    shapes: Sequence[tuple[int | None, ...]],
) -> Callable[..., Any]:
    """Compile a function of float32 batches as one graph, traced once for batches of all sizes.

    Args:
        vae: whose weights the function uses; TensorFlow sees them by itself.
        function: of tensors, which gives tensors.
        shapes: of its arguments, None for any size.
    """
    return tf.function(function, input_signature=[tf.TensorSpec(shape) for shape in shapes])


def synchronise(vae: keras.Model) -> None:
    """Update the variables, inside `fit`: TensorFlow's are always up to date."""


def copies(variables: Iterable[Any]) -> list[Any]:
    """Copy the values of variables."""
    return [np.array(variable.numpy()) for variable in variables]


@tf.custom_gradient
def add_bias(outputs: Tensor, bias: Tensor) -> Any:
    """Add one number a channel; its gradient is summed in float32, whatever the outputs are."""

    def gradients(upstream: Tensor) -> tuple[Tensor, Tensor]:
        axes = list(range(upstream.shape.rank - 1))
        total = tf.reduce_sum(tf.cast(upstream, "float32"), axis=axes)
        return upstream, tf.cast(total, upstream.dtype)

    return tf.nn.bias_add(outputs, bias), gradients


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile many small operations, and their gradient, into few passes over the memory.

    On CPUs: on a GPU the whole step is compiled.
    """
    if has_gpu() or replicas() > 1:
        return function
    return tf.function(function, autograph=False, jit_compile=True)


def terms(vae: keras.Model, images: Tensor, noise: Tensor) -> Terms:
    """Compute the terms of a batch."""
    found = _for_each_part(
        vae, images, noise, lambda images, noise, share: vae.terms(images, noise)
    )
    return _join(found, tf.shape(images)[0])


def elbo_gradients(
    vae: keras.Model, images: Tensor, noise: Tensor, weight: Tensor | float
) -> tuple[Terms, Tensor, list[Tensor]]:
    """Compute terms, loss and its gradient in every trainable variable."""
    return _in_parts(_elbo_gradients, vae, images, noise, weight)


def importance_weighted_gradients(
    vae: keras.Model, images: Tensor, noise: Tensor, weight: Tensor | float
) -> tuple[Terms, Tensor, list[Tensor]]:
    """Compute the same for the tighter bound, doubly reparameterised for the encoder."""
    return _in_parts(_importance_weighted_gradients, vae, images, noise, weight)


def _elbo_gradients(
    vae: keras.Model, weight: Tensor | float, images: Tensor, noise: Tensor, share: Tensor | float
) -> tuple[Terms, Tensor, list[Tensor]]:
    with tf.GradientTape() as tape:
        terms = vae.terms(images, noise, training=True)
        loss = vae.loss_of(terms, weight) * share
    return terms, loss, tape.gradient(loss, vae.trainable_variables)


def _importance_weighted_gradients(
    vae: keras.Model, weight: Tensor | float, images: Tensor, noise: Tensor, share: Tensor | float
) -> tuple[Terms, Tensor, list[Tensor]]:
    """Differentiate with the chain rule cut at the latents.

    There the gradient on its way to the encoder is multiplied by
    `objective.doubly_reparameterised_factor`.
    """
    with tf.GradientTape(persistent=True) as tape:
        terms = vae.terms(images, noise, training=True)
        log_weights = vae.log_weights(terms, weight)
        bound = ops.mean(objective.importance_weighted_bound(log_weights))
        loss = -bound * share
    generative = [*vae.decoder.trainable_variables, *vae.prior.trainable_variables]
    others, in_latents = tape.gradient(loss, [generative, terms.latents])
    factor = objective.doubly_reparameterised_factor(log_weights, weight)[..., None]
    encoder = tape.gradient(
        terms.latents, vae.encoder.trainable_variables, output_gradients=factor * in_latents
    )
    # In the order of `trainable_variables`: the encoder's come first.
    return terms, loss, [*encoder, *others]


def _in_parts(
    find: Callable[..., Any],
    vae: keras.Model,
    images: Tensor,
    noise: Tensor,
    weight: Tensor | float,
) -> tuple[Terms, Tensor, list[Tensor]]:
    """Compute gradients for the parts of a batch, and put them together."""
    found = _for_each_part(vae, images, noise, partial(find, vae, weight))
    terms, losses, gradients = zip(*found, strict=True)
    return (
        _join(terms, tf.shape(images)[0]),
        tf.add_n(losses),
        [tf.add_n(of_one) for of_one in zip(*gradients, strict=True)],
    )


def _for_each_part(
    vae: keras.Model, images: Tensor, noise: Tensor, find: Callable[..., Any]
) -> list[Any]:
    """Call a function for each part of a batch, with its images, noise and fraction of the batch.

    Nothing in one waits for another: TensorFlow works on them side by side. Without images it would
    fail, so a part for which there are none has the last image once more, and no share.
    """
    if vae.parts == 1:
        if vae.jit_replicas:
            # Made anew in every replica, so that each has its own device's weights in it.
            find = tf.function(find, autograph=False, jit_compile=True)
        return [find(images, noise, 1.0)]
    find = tf.function(find, autograph=False)  # is made once for all parts
    count = tf.shape(images)[0]
    size = -(-count // vae.parts)
    found = []
    for start in (part * size for part in range(vae.parts)):
        first = tf.minimum(start, count - 1)
        share = tf.cast(tf.clip_by_value(count - start, 0, size) / count, "float32")
        found.append(find(images[first : first + size], noise[:, first : first + size], share))
    return found


def _join(parts: Any, count: Tensor) -> Terms:
    """Join the terms of the parts of a batch of `count` images."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name, values in zip(parts[0]._fields, zip(*parts, strict=True), strict=True):
        if name in ("log_likelihood", "prior_correction"):
            joined[name] = tf.concat(values, axis=-1)[..., :count]
        else:
            joined[name] = tf.concat(values, axis=-2)[..., :count, :]
    return type(parts[0])(**joined)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all gradients together."""
    return tf.linalg.global_norm(gradients)


def apply_if(
    sound: Tensor,
    optimizer: keras.optimizers.Optimizer,
    gradients: list[Tensor],
    variables: list[keras.Variable],
) -> None:
    """Apply the gradients, or leave everything as it is."""
    if replicas() == 1:
        tf.cond(sound, lambda: optimizer.apply(gradients, variables), lambda: None)
        return
    # Replicas may not meet inside a condition, as they do to apply gradients: choose afterwards.
    changed = [variable.value for variable in (*variables, *optimizer.variables)]
    before = [tf.identity(variable) for variable in changed]
    # The optimizer adds up what it gets from the replicas.
    optimizer.apply([gradient / replicas() for gradient in gradients], variables)
    for variable, value in zip(changed, before, strict=True):
        variable.assign(tf.where(sound, variable, value))


def in_one_pass(change: Callable[[], None]) -> None:
    """Change variables in one pass over their memory, compiled by XLA."""
    if replicas() == 1:
        tf.function(lambda: change(), jit_compile=True)()
    else:
        change()


def replicas() -> int:
    """Return how many copies of the model, each on its own device, share every batch evenly."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_part(values: Any, axis: int) -> Tensor:
    """Select this replica's part of values for the images of all replicas."""
    if replicas() == 1:
        return values
    index = tf.distribute.get_replica_context().replica_id_in_sync_group
    size = ops.shape(values)[axis] // replicas()
    return tf.gather(values, index * size + tf.range(size), axis=axis)


def average(values: list[Any]) -> list[Any]:
    """Average values over the replicas."""
    if replicas() == 1:
        return values
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
