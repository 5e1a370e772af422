"""The lecture's objective, as pure functions of one mini-batch.

For an image x and a latent t, with q(t|x) = N(m, exp v) and prior N(0, I), or another that is
learned (see `vaeflow.model.prior`):

    ELBO(x) = E_q[log p(x|t)] - KL(q(t|x) || N(0, I))          (Kingma & Welling 2014, eq. 3)

The expectation is estimated by the mean over `samples` draws of t. The objective of the whole data
set is the sum of ELBO(x_i) over its N images. A mini-batch of M images estimates it without bias by
N/M times the sum over the batch. Training uses the *mean* over the batch, which is that estimate
divided by the constant N: the same direction, and a scale that does not depend on N or M.

Values are in nats. Axes are named in the order `(samples, batch, latent_dim)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops

from vaeflow.model.likelihoods import LOG_2_PI

# A tensor of whatever backend Keras has, or a symbolic one; Keras comes without types.
Tensor: TypeAlias = Any

# === The two terms ===


def reparameterise(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Draw t ~ q(t|x) as a differentiable function of noise ~ N(0, I) (Kingma & Welling 2014, 2.4).

    Args:
        mean: `(batch, latent_dim)`.
        log_variance: the same shape.
        noise: broadcastable against them, e.g. `(samples, batch, latent_dim)`.

    Returns:
        Latents, of the broadcast shape.
    """
    return mean + ops.exp(0.5 * log_variance) * noise


def kl_per_dimension(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute KL(N(m, exp v) || N(0, 1)) of each latent dimension (Kingma & Welling 2014, app. B).

    Args:
        mean: any shape.
        log_variance: the same shape.

    Returns:
        Nats, of the same shape; never negative.
    """
    # expm1(v) - v = exp v - 1 - v without losing digits when v is near zero.
    return 0.5 * (ops.square(mean) + ops.expm1(log_variance) - log_variance)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute KL(q(t|x) || N(0, I)): the sum over the latent dimensions.

    Args:
        mean: `(..., latent_dim)`.
        log_variance: the same shape.

    Returns:
        Nats per image, `(...)`.
    """
    return ops.sum(kl_per_dimension(mean, log_variance), axis=-1)


def elbo(log_likelihood: Tensor, kl: Tensor) -> Tensor:
    """Compute the evidence lower bound: the Monte Carlo term minus the KL. Nats, `(batch,)`."""
    # + E_q log p(x|t), estimated by the given draws; - KL(q || prior), exact.
    return log_likelihood - kl


class Terms(NamedTuple):
    """What one pass through the model gives, in nats.

    Attributes:
        log_likelihood: log p(x|t) of each draw, `(samples, batch)`.
        latents: the draws, `(samples, batch, latent_dim)`.
        prior_correction: log p(t) - log N(t; 0, I) of each draw, `(samples, batch)`.
        mean: of q(t|x), `(batch, latent_dim)`.
        log_variance: the same shape.
    """

    log_likelihood: keras.KerasTensor
    latents: keras.KerasTensor
    prior_correction: keras.KerasTensor
    mean: keras.KerasTensor
    log_variance: keras.KerasTensor

    @property
    def mean_log_likelihood(self) -> Tensor:
        """E_q[log p(x|t)], estimated from the draws: `(batch,)`."""
        return ops.mean(self.log_likelihood, axis=0)

    @property
    def mean_prior_correction(self) -> Tensor:
        """E_q[log p(t) - log N(t; 0, I)], estimated from the draws: `(batch,)`."""
        return ops.mean(self.prior_correction, axis=0)

    @property
    def kl(self) -> Tensor:
        """KL(q(t|x) || p(t)), `(batch,)`: exact where p is N(0, I)."""
        return kl_divergence(self.mean, self.log_variance) - self.mean_prior_correction

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound, `(batch,)`."""
        return elbo(self.mean_log_likelihood, self.kl)


# === What training does with the KL term ===


def kl_weight(step: Tensor, warmup_steps: int, beta: float) -> Tensor:
    """Return the weight of the KL term: raised linearly to beta over the first steps.

    Beta other than 1 is the beta-VAE of Higgins et al. 2017; raising it slowly keeps the decoder
    from learning to do without the latent (warm-up: Sønderby et al. 2016).

    Args:
        step: steps made before this one, from 0.
        warmup_steps: how many steps the rise takes; 0 for none.
        beta: the final weight.
    """
    if warmup_steps == 0:
        return beta
    return beta * ops.minimum(1.0, (step + 1.0) / warmup_steps)


def free_bits_kl(kl_of_dimensions: Tensor, free_bits: float) -> Tensor:
    """Compute a KL term in which a dimension costs nothing below `free_bits` (Kingma et al. 2016).

    Theirs (appendix C.8) is a floor on the dimension's mean over a mini-batch, so that the
    objective depends on which images share one, and on how many devices share it. Here the floor is
    on every image's own KL: the mean over images is linear in them, and a mini-batch, or a part of
    one, estimates that of the whole data set without bias. With a floor other than 0 it is an
    objective of its own, which no longer bounds log p(x). Under a learned prior it is the KL from
    N(0, 1) that has the floor; what the prior corrects is taken off whole.

    Args:
        kl_of_dimensions: from `kl_per_dimension`, `(batch, latent_dim)`.
        free_bits: the floor, in nats per image and latent dimension.

    Returns:
        Nats per image, `(batch,)`.
    """
    return ops.sum(ops.maximum(kl_of_dimensions, free_bits), axis=-1)


def weighted_elbo(
    log_likelihood: Tensor,
    kl_of_dimensions: Tensor,
    weight: Tensor | float = 1.0,
    free_bits: float = 0.0,
    prior_correction: Tensor | float = 0.0,
) -> Tensor:
    """Compute what training maximises under `objective: elbo`.

    With weight 1 and no free bits it is the mean ELBO over the batch: the lecture's N/M-weighted
    sum, divided by N.

    Args:
        log_likelihood: mean over the draws, `(batch,)`.
        kl_of_dimensions: `(batch, latent_dim)`.
        weight: from `kl_weight`.
        free_bits: nats per image and latent dimension.
        prior_correction: mean over the draws, `(batch,)`.

    Returns:
        Nats per image, a scalar.
    """
    kl = free_bits_kl(kl_of_dimensions, free_bits) - prior_correction
    return ops.mean(log_likelihood - weight * kl)


# === The importance-weighted bound ===


def gaussian_log_density(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute the log density of a diagonal Gaussian, summed over the last axis. Nats, `(...)`."""
    squared = ops.square(values - mean) * ops.exp(-log_variance)
    return -0.5 * ops.sum(LOG_2_PI + log_variance + squared, axis=-1)


def log_importance_weights(
    log_likelihood: Tensor,
    latents: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    weight: Tensor | float = 1.0,
    prior_correction: Tensor | float = 0.0,
) -> Tensor:
    """Compute log p(x|t) (p(t) / q(t|x))^weight of latents drawn from q (Burda 2016, eq. 7).

    Args:
        log_likelihood: `(samples, batch)`.
        latents: `(samples, batch, latent_dim)`.
        mean: `(batch, latent_dim)`.
        log_variance: the same shape.
        weight: from `kl_weight`; 1 for the weights of the bound itself.
        prior_correction: log p(t) - log N(t; 0, I), `(samples, batch)`.

    Returns:
        Nats, `(samples, batch)`.
    """
    log_prior = gaussian_log_density(latents, 0.0, ops.zeros_like(log_variance)) + prior_correction
    log_posterior = gaussian_log_density(latents, mean, log_variance)
    return log_likelihood + weight * (log_prior - log_posterior)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Compute the log of the mean importance weight (Burda et al. 2016, eq. 8).

    Args:
        log_weights: `(samples, batch)`.

    Returns:
        Nats per image, `(batch,)`: a lower bound of log p(x) in the mean, tight as samples grow.
    """
    samples = ops.cast(ops.shape(log_weights)[0], log_weights.dtype)
    return ops.logsumexp(log_weights, axis=0) - ops.log(samples)


def doubly_reparameterised_factor(log_weights: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Compute the factor for the gradient in each latent on its way to the encoder: DReG.

    With the normalised importance weights r_k, the bound's gradient is the sum of r_k d log w_k.
    Its part through the density q(t|x) has a variance that drowns the signal as samples grow. An
    integration by parts turns that part into one through the latents alone (Tucker et al. 2019,
    sec. 3): for the encoder, r_k becomes r_k * ((1 - weight) + weight * r_k), which for weight 1 is
    their r_k^2. The decoder's gradient stays as it was. Unbiased for the gradient of the bound of
    as many samples, which is not that of log p(x).

    Used so: hold q's mean and log variance fixed inside `log_importance_weights`, differentiate the
    bound in the latents, multiply by this factor, and go on through `reparameterise`.

    Args:
        log_weights: from `log_importance_weights` with the same `weight`, `(samples, batch)`.
        weight: from `kl_weight`.

    Returns:
        `(samples, batch)`, in [0, 1] for weights in [0, 1]; a constant to differentiation.
    """
    normalised = ops.exp(log_weights - ops.logsumexp(log_weights, axis=0, keepdims=True))
    return ops.stop_gradient((1.0 - weight) + weight * normalised)


# === For comparison ===


def score_function_surrogate(values: Tensor, log_density: Tensor) -> Tensor:
    """Return a function whose gradient estimates that of E_q[values] by the log-derivative trick.

    d E_q[f] = E_q[f d log q + d f] (Williams 1992). Unbiased like the reparameterised gradient, but
    of a far larger variance, as docs/gradient_variance.png shows: training does not use it.

    Args:
        values: f at draws of t that are held fixed, `(samples, batch)`.
        log_density: log q of the same draws, `(samples, batch)`.

    Returns:
        `(batch,)`; only its gradient means something.
    """
    return ops.mean(ops.stop_gradient(values) * log_density + values, axis=0)
