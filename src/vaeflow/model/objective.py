"""The lecture's objective, as pure functions of one mini-batch.

For an image x and a latent t, with q(t|x) = N(m, exp v) and prior N(0, I):

    ELBO(x) = E_q[log p(x|t)] - KL(q(t|x) || N(0, I))          (Kingma & Welling 2014, eq. 3)

The objective of the whole data set is the sum of ELBO(x_i) over its N images. A mini-batch of M
images estimates it without bias by N/M times the sum over the batch. Training uses the *mean* over
the batch, which is that estimate divided by the constant N: the same direction, and a scale that
does not depend on N or M.

Every function returns one number per image, shape `(batch,)`, in nats; averaging is the caller's.
"""

import math

from keras import ops

LOG_2_PI = math.log(2.0 * math.pi)


def reparameterise(mean, log_variance, noise):
    """Draw t ~ q(t|x) as a differentiable function of noise ~ N(0, I) (Kingma & Welling 2014, 2.4).

    Args:
        mean, log_variance: `(batch, latent_dim)`.
        noise: broadcastable against them, e.g. `(samples, batch, latent_dim)`.

    Returns:
        Latents, of the broadcast shape.
    """
    return mean + ops.exp(0.5 * log_variance) * noise


def kl_divergence(mean, log_variance):
    """KL(N(m, exp v) || N(0, I)) in closed form (Kingma & Welling 2014, appendix B).

    Args:
        mean, log_variance: `(..., latent_dim)`.

    Returns:
        Nats per image, `(...)`; never negative.
    """
    # expm1(v) - v = exp v - 1 - v without losing digits when v is near zero.
    return 0.5 * ops.sum(ops.square(mean) + ops.expm1(log_variance) - log_variance, axis=-1)


def bernoulli_log_likelihood(images, logits):
    """Log p(x|t) of independent Bernoulli pixels, from logits.

    For grey pixels in (0, 1) the value is a cross-entropy, not the likelihood of the data.

    Args:
        images: `(batch, height, width, channels)` in [0, 1].
        logits: `(..., batch, height, width, channels)`, any number of leading sample axes.

    Returns:
        Nats per image, `(..., batch)`.
    """
    # log p = x log sigmoid(l) + (1 - x) log sigmoid(-l) = x l - softplus(l)
    return ops.sum(images * logits - ops.softplus(logits), axis=(-3, -2, -1))


def elbo(log_likelihood, kl):
    """Evidence lower bound: one Monte Carlo term minus the closed-form KL. Nats per image."""
    # + E_q log p(x|t), estimated by the given draw; - KL(q || prior), exact.
    return log_likelihood - kl


def gaussian_log_density(values, mean, log_variance):
    """Log density of a diagonal Gaussian, summed over the last axis. Nats, shape `(...)`."""
    squared = ops.square(values - mean) * ops.exp(-log_variance)
    return -0.5 * ops.sum(LOG_2_PI + log_variance + squared, axis=-1)


def log_importance_weights(log_likelihood, latents, mean, log_variance):
    """Log of p(x|t) p(t) / q(t|x) for latents drawn from q (Burda et al. 2016, eq. 7).

    Args:
        log_likelihood: `(samples, batch)`.
        latents: `(samples, batch, latent_dim)`.
        mean, log_variance: `(batch, latent_dim)`.

    Returns:
        Nats, `(samples, batch)`.
    """
    log_prior = gaussian_log_density(latents, 0.0, ops.zeros_like(log_variance))
    log_posterior = gaussian_log_density(latents, mean, log_variance)
    return log_likelihood + log_prior - log_posterior


def importance_weighted_bound(log_weights):
    """Log of the mean importance weight (Burda et al. 2016, eq. 8).

    Args:
        log_weights: `(samples, batch)`.

    Returns:
        Nats per image, `(batch,)`: a lower bound of log p(x) in the mean, tight as samples grow.
    """
    samples = ops.cast(ops.shape(log_weights)[0], log_weights.dtype)
    return ops.logsumexp(log_weights, axis=0) - ops.log(samples)
