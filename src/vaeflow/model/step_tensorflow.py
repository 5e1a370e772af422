"""What a training step needs of TensorFlow: gradients, and a step that can be left out.

`step_jax` has the same functions for JAX.
"""

from __future__ import annotations

import tensorflow as tf
from keras import ops

from vaeflow.model import objective


def run(vae, step, data):
    """Make a step on a batch; TensorFlow changes variables in place."""
    return step(data)


def synchronise(vae):
    """Have the variables say, inside `fit`, what the steps have made of them; they always do."""


def elbo_gradients(vae, images, noise, weight):
    """Terms, loss and its gradient in every trainable variable."""
    with tf.GradientTape() as tape:
        terms = vae.terms(images, noise, training=True)
        loss = vae.loss_of(terms, weight)
    return terms, loss, tape.gradient(loss, vae.trainable_variables)


def importance_weighted_gradients(vae, images, noise, weight):
    """The same for the importance-weighted bound, doubly reparameterised for the encoder.

    The chain rule is cut at the latents, where the gradient on its way to the encoder is
    multiplied by `objective.doubly_reparameterised_factor`.
    """
    with tf.GradientTape(persistent=True) as tape:
        terms = vae.terms(images, noise, training=True)
        log_weights = vae.log_weights(terms, weight)
        loss = -ops.mean(objective.importance_weighted_bound(log_weights))
    decoder, in_latents = tape.gradient(loss, [vae.decoder.trainable_variables, terms.latents])
    factor = objective.doubly_reparameterised_factor(log_weights, weight)[..., None]
    encoder = tape.gradient(
        terms.latents, vae.encoder.trainable_variables, output_gradients=factor * in_latents
    )
    # In the order of `trainable_variables`: the encoder's come first.
    return terms, loss, [*encoder, *decoder]


def global_norm(gradients):
    """The Euclidean norm of all gradients together."""
    return tf.linalg.global_norm(gradients)


def apply_if(sound, optimizer, gradients, variables):
    """Apply the gradients, or leave everything as it is."""
    if replicas() == 1:
        # Dozens of small operations on every weight: XLA makes one pass over the memory of them.
        apply = tf.function(lambda: optimizer.apply(gradients, variables), jit_compile=True)
        tf.cond(sound, apply, lambda: None)
        return
    # Replicas may not meet inside a condition, as they do to apply gradients: choose afterwards.
    changed = [variable.value for variable in (*variables, *optimizer.variables)]
    before = [tf.identity(variable) for variable in changed]
    # The optimizer adds up what it gets from the replicas.
    optimizer.apply([gradient / replicas() for gradient in gradients], variables)
    for variable, value in zip(changed, before, strict=True):
        variable.assign(tf.where(sound, variable, value))


def replicas() -> int:
    """How many copies of the model, each on a device of its own, share every batch evenly."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def own_part(values, axis):
    """Of values for all replicas' images, those for this one's."""
    if replicas() == 1:
        return values
    index = tf.distribute.get_replica_context().replica_id_in_sync_group
    size = ops.shape(values)[axis] // replicas()
    return tf.gather(values, index * size + tf.range(size), axis=axis)


def average(values):
    """Means over the replicas."""
    if replicas() == 1:
        return values
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
