"""What a training step needs of JAX: gradients, and a step that can be left out.

JAX differentiates and compiles functions without side effects. Inside a `keras.StatelessScope`
variables read and assigned are values of the scope, and the step can be written as for TensorFlow.
`tensorflow` beside it has the same functions for TensorFlow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import keras
from jax import numpy as jnp
from keras import ops

from vaeflow.model import objective
from vaeflow.model.objective import Tensor, Terms


def run(
    vae: keras.Model, step: Callable[[Any], dict[str, Tensor]], state: Sequence[Any], data: Any
) -> Any:
    """Make a step on a batch, or one after the other on each of several that come stacked.

    Those of a stack are one loop inside one compiled program: the host has nothing to do with them
    between the first and the last.

    Args:
        state: values of the variables, in the groups that Keras hands to `train_step` (four) or
            `test_step` (three).
        data: of `vaeflow.data.batches.Batches`: images or rows, and for rows the images that they
            are of.

    Returns:
        What the last step returns, and the values after it.
    """
    groups = [vae.trainable_variables, vae.non_trainable_variables, vae.metrics_variables]
    if len(state) == 4:
        groups.insert(2, vae.optimizer.variables)

    def one(state: Any, batch: Any) -> tuple[Any, Any]:
        with _values_of(itertools.chain(*groups), itertools.chain(*state)) as scope:
            results = step((batch, *others))
        values = ([scope.get_current_value(variable) for variable in group] for group in groups)
        return tuple(values), results

    batches, *others = data if isinstance(data, list | tuple) else (data,)
    if not _is_stack(batches):
        after, results = one(tuple(state), batches)
        return results, after
    after, results = jax.lax.scan(one, tuple(state), batches)
    return {name: values[-1] for name, values in results.items()}, after


def _is_stack(batches: Any) -> bool:
    """Return whether these are several batches, of images or of rows, on a new first axis."""
    return len(batches.shape) in (2, 5)


def compiled(
    vae: keras.Model,
    function: Callable[..., Any],
    shapes: Sequence[tuple[int | None, ...]],
) -> Callable[..., Any]:
    """Compile a function of float32 batches, for each size that is met.

    The weights are arguments of the program: as constants, of which JAX would take them, they would
    have XLA compute with them for minutes.

    Args:
        vae: whose weights the function uses.
        function: of arrays, which gives arrays.
        shapes: of its arguments, None for any size: JAX sees them by itself.
    """
    variables = [*vae.encoder.variables, *vae.decoder.variables, *vae.prior.variables]

    @jax.jit
    def with_values(values: Any, *arguments: Any) -> Any:
        with _values_of(variables, values):
            return function(*arguments)

    return lambda *arguments: with_values([variable.value for variable in variables], *arguments)


def synchronise(vae: keras.Model) -> None:
    """Update the variables, inside `fit`, to what the steps have made of them."""
    vae.jax_state_sync()


def copies(variables: Iterable[Any]) -> list[Any]:
    """Copy the values of variables; they stay on the device."""
    return [jnp.copy(variable.value) for variable in variables]


@jax.custom_vjp
def add_bias(outputs: Tensor, bias: Tensor) -> Tensor:
    """Add one number a channel; its gradient is summed in float32, whatever the outputs are."""
    return outputs + bias


def _sum_in_float32(_: None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    total = jnp.sum(gradient, axis=tuple(range(gradient.ndim - 1)), dtype="float32")
    return gradient, total.astype(gradient.dtype)


add_bias.defvjp(lambda outputs, bias: (outputs + bias, None), _sum_in_float32)


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function: the whole step is compiled."""
    return function


def terms(vae: keras.Model, images: Tensor, noise: Tensor) -> Terms:
    """Compute the terms of a batch."""
    return vae.terms(images, noise)


def elbo_gradients(
    vae: keras.Model, images: Tensor, noise: Tensor, weight: Tensor | float
) -> tuple[Terms, Tensor, list[Tensor]]:
    """Compute terms, loss and its gradient in every trainable variable."""

    def loss_and_terms(values: Any) -> Any:
        with _values_of(vae.trainable_variables, values):
            terms = vae.terms(images, noise, training=True)
            return vae.loss_of(terms, weight), terms

    values = [variable.value for variable in vae.trainable_variables]
    (loss, terms), gradients = jax.value_and_grad(loss_and_terms, has_aux=True)(values)
    return terms, loss, gradients


def importance_weighted_gradients(
    vae: keras.Model, images: Tensor, noise: Tensor, weight: Tensor | float
) -> tuple[Terms, Tensor, list[Tensor]]:
    """Compute the same for the importance-weighted bound, doubly reparameterised for the encoder.

    The chain rule is cut at the latents, where the gradient on its way to the encoder is
    multiplied by `objective.doubly_reparameterised_factor`.
    """

    def latents_and_posterior(values: Any) -> Any:
        with _values_of(vae.encoder.trainable_variables, values):
            return vae.draw(images, noise, training=True)

    def loss_and_terms(values: Any, latents: Tensor) -> Any:
        with _values_of(generative, values):
            log_likelihood = vae.log_likelihood(images, latents, training=True)
            correction = vae.prior.correction(latents)
        terms = Terms(log_likelihood, latents, correction, **posterior)
        log_weights = vae.log_weights(terms, weight)
        loss = -ops.mean(objective.importance_weighted_bound(log_weights))
        return loss, (terms, log_weights)

    generative = [*vae.decoder.trainable_variables, *vae.prior.trainable_variables]
    encoder, others = (
        [variable.value for variable in variables]
        for variables in (vae.encoder.trainable_variables, generative)
    )
    latents, pull_back, posterior = jax.vjp(latents_and_posterior, encoder, has_aux=True)
    find = jax.value_and_grad(loss_and_terms, argnums=(0, 1), has_aux=True)
    (loss, (terms, log_weights)), (others, in_latents) = find(others, latents)
    factor = objective.doubly_reparameterised_factor(log_weights, weight)[..., None]
    (encoder,) = pull_back(factor * in_latents)
    # In the order of `trainable_variables`: the encoder's come first.
    return terms, loss, [*encoder, *others]


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all gradients together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients))


def apply_if(
    sound: Tensor,
    optimizer: keras.optimizers.Optimizer,
    gradients: list[Tensor],
    variables: list[keras.Variable],
) -> None:
    """Apply the gradients, or leave everything as it is."""
    changed = [*variables, *optimizer.variables]
    now = [(variable, variable.value) for variable in changed]
    with _ChangedIf(sound, state_mapping=now) as scope:
        optimizer.apply(gradients, variables)
    for variable in changed:
        variable.assign(scope.get_current_value(variable))


class _ChangedIf(keras.StatelessScope):
    """Let variables change inside only under a condition.

    Chosen at once, a moment is read by what comes next as it will be kept. Were all chosen in the
    end, XLA would keep a copy of each as it was before the step.
    """

    def __init__(self, condition: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.condition = condition

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        variable, value = update
        before = self.get_current_value(variable)
        super().add_update((variable, jnp.where(self.condition, value, before)))


def in_one_pass(change: Callable[[], None]) -> None:
    """Change variables; the whole step is compiled anyway."""
    change()


def replicas() -> int:
    """Return one: where several devices share a batch, JAX has the program see all of it."""
    return 1


def replica_part(values: Any, axis: int) -> Tensor:
    """Return all values; see `replicas`."""
    return values


def average(values: list[Any]) -> list[Any]:
    """Return the values as they are; see `replicas`."""
    return values


def _values_of(variables: Iterable[Any], values: Iterable[Any]) -> keras.StatelessScope:
    """Give the variables these values inside."""
    return keras.StatelessScope(state_mapping=zip(variables, values, strict=True))
