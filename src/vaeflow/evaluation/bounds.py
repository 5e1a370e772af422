"""Compute the ELBO, the importance-weighted bound and the anomaly score of many images, in blocks.

A score is minus the ELBO of an image as it comes, never binarised, in nats: what
`vaeflow.bundle.runtime.Bundle.score` answers, so that its quantiles can go with the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from vaeflow.bundle.manifest import write_reference
from vaeflow.bundle.runtime import SCORE_SAMPLES
from vaeflow.common.progress import Progress
from vaeflow.data.images import Images
from vaeflow.model import objective
from vaeflow.model.device import has_gpu
from vaeflow.model.hosts import Hosts
from vaeflow.model.steps import backend
from vaeflow.model.vae import VAE

IMAGES_PER_BLOCK = 64
# Numbers that the decoder's widest layer holds at once, 32 MB, or 512 MB on a GPU, which fewer do
# not fill: bounds memory whatever the size of the images, the network and the number of samples.
VALUES_PER_BLOCK, VALUES_PER_BLOCK_ON_GPU = 8_000_000, 128_000_000
ACTIVE_VARIANCE = 0.01
# Of the draws that an estimate stands for, one in so many is made in the mean; and of these, all
# images get one in so many.
DRAWN_SHARE, FIRST_SHARE = 4, 3
REFERENCE_IMAGES = 5_000
LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


class Bounds(NamedTuple):
    """Per image: nats, `(images,)`; the last three `(images, latent_dim)`.

    `kl` is that from the prior; by dimension it is that from N(0, 1), in nats, whose sum it is
    where this is the prior. `means` and `log_variances` are those of q(t|x).
    """

    elbo: np.ndarray
    log_likelihood: np.ndarray
    kl: np.ndarray
    importance_weighted_bound: np.ndarray
    kl_per_dimension: np.ndarray
    means: np.ndarray
    log_variances: np.ndarray


class Estimate(NamedTuple):
    """An estimate of the mean over images of the bound from many draws, in nats per image.

    Attributes:
        mean: of the bound over the images.
        standard_error: how far it may be from that over all images of the kind.
        draws: how many were made, of all images together.
    """

    mean: float
    standard_error: float
    draws: int


def compute_bounds(
    vae: VAE, images: Images, samples: int, seed: int, hosts: Hosts | None = None
) -> Bounds:
    """Estimate both bounds of each image from the same posterior draws, in bounded memory.

    The same seed gives the same draws however they are cut into blocks.

    Args:
        vae: the model.
        images: uint8, `(images, height, width, channels)`.
        samples: draws per image; the ELBO's expectation is their mean, the importance-weighted
            bound (Burda et al. 2016) the log of their mean weight.
        seed: of the draws.
        hosts: the processes that divide the images among them; all get the same bounds.
    """
    sums = _sum(vae, images, samples, seed, "bounds", hosts)
    log_likelihood = sums.log_likelihood / samples
    kl_per_dimension = ops.convert_to_numpy(
        objective.kl_per_dimension(sums.means, sums.log_variances)
    )
    kl = kl_per_dimension.sum(axis=1) - sums.correction / samples
    return Bounds(
        elbo=objective.elbo(log_likelihood, kl),
        log_likelihood=log_likelihood,
        kl=kl,
        importance_weighted_bound=sums.log_weights - math.log(samples),
        kl_per_dimension=kl_per_dimension,
        means=sums.means,
        log_variances=sums.log_variances,
    )


def estimate_bound(
    vae: VAE,
    images: Images,
    samples: int,
    seed: int,
    share: int = DRAWN_SHARE,
    hosts: Hosts | None = None,
) -> Estimate:
    """Estimate the mean importance-weighted bound from `samples` draws an image, with a share.

    All images get a third of these draws. The others are made for some images, chosen at random,
    with a probability that is larger where the weights still vary; what they add there is divided
    by that probability, and so stands for the images that were not chosen. That is unbiased for
    what `compute_bounds` would give in the mean (the estimator of Horvitz & Thompson 1952). To stop
    where the weights seem to have settled would not be: a large one may only not have been drawn.

    Args:
        vae, images, samples, seed, hosts: as for `compute_bounds`.
        share: one in so many draws is made; the more images, the fewer are needed.
    """
    first = -(-samples // (share * FIRST_SHARE))
    rest = samples - first
    some = _sum(vae, images, first, seed, "bounds", hosts)
    few = some.log_weights - math.log(first)
    # From 1, where one draw has all the weight, to `first`.
    effective = np.exp(2 * some.log_weights - some.log_squared_weights)
    wanted = max(0.0, (samples / share - first) / max(1, rest))
    probability = _with_mean(1 / np.sqrt(effective), wanted)
    chosen = np.random.default_rng((seed, 1)).random(len(images)) < probability
    values = few.copy()
    if rest and chosen.any():
        needed = np.asarray(images[chosen])
        more = _sum(vae, needed, rest, seed + 1, "bounds, where needed", hosts)
        many = np.logaddexp(some.log_weights[chosen], more.log_weights) - math.log(samples)
        values[chosen] += (many - few[chosen]) / probability[chosen]
    return Estimate(
        mean=float(values.mean()),
        standard_error=float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0,
        draws=first * len(images) + rest * int(chosen.sum()),
    )


def _with_mean(shares: np.ndarray, mean: float) -> np.ndarray:
    """Scale positive numbers so that, cut off at 1, they have this mean."""
    if mean >= 1:
        return np.ones_like(shares)
    probability = shares * (mean / shares.mean())
    while (over := probability > 1).any() and not over.all():
        probability[over] = 1
        free = probability < 1
        wanted = mean * len(shares) - np.count_nonzero(~free)
        probability[free] *= wanted / probability[free].sum()
    return np.minimum(probability, 1)


class _Sums(NamedTuple):
    """Sums over the draws of each image, `(images,)`, and its posterior."""

    log_likelihood: np.ndarray
    correction: np.ndarray
    log_weights: np.ndarray
    log_squared_weights: np.ndarray
    means: np.ndarray
    log_variances: np.ndarray


def _sum(
    vae: VAE, images: Images, samples: int, seed: int, what: str, hosts: Hosts | None = None
) -> _Sums:
    """Decode as many draws of each image, block by block.

    Processes take blocks in turn. To draw for a block takes little of the time of decoding: each
    draws for those of the others too, and so for its own what one alone would.
    """
    hosts = hosts or Hosts()
    encode = backend().compiled(
        vae, lambda pixels: vae.encoder(pixels), [(None, *vae.config.image_shape)]
    )
    decode = _compiled(vae)
    together = draws_at_once(vae)
    size = min(IMAGES_PER_BLOCK, together)
    shapes = [
        (min(at_once, samples - start), count, vae.config.latent_dim)
        for count in (min(size, len(images) - first) for first in range(0, len(images), size))
        for at_once in [max(1, together // count)]
        for start in range(0, samples, at_once)
    ]
    posteriors = np.zeros((2, len(images), vae.config.latent_dim), np.float32)
    sums = _Sums(*np.zeros((4, len(images))), *posteriors)
    with (
        Progress(what, len(images) * samples) as progress,
        closing(_drawn_ahead(shapes, seed)) as noise,
    ):
        for number, start in enumerate(range(0, len(images), size)):
            rows = slice(start, min(start + size, len(images)))
            if number % hosts.count != hosts.process:
                _let_go_by(noise, samples)
                progress.advance((rows.stop - start) * samples)
                continue
            block = _sum_block(encode, decode, _scaled(images[rows]), samples, noise, progress)
            for values, of_block in zip(sums, block, strict=True):
                values[rows] = of_block
            hosts.step()
    # For each image all processes but one have zero.
    return _Sums(*(hosts.gather(values).sum(axis=0) for values in sums))


def _let_go_by(noise: Iterator[np.ndarray], samples: int) -> None:
    """Take the draws of a block and make no use of them."""
    while samples > 0:
        samples -= len(next(noise))


def _drawn_ahead(shapes: Sequence[tuple[int, ...]], seed: int) -> Generator[np.ndarray]:
    """Yield draws of N(0, 1) in these shapes, each drawn while the one before is made use of."""
    generator = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    with ThreadPoolExecutor(1) as thread:
        ahead: Future[np.ndarray] | None = None
        for shape in shapes:
            drawn, ahead = ahead, thread.submit(draw, shape)
            if drawn is not None:
                yield drawn.result()
        if ahead is not None:
            yield ahead.result()


def scaled_blocks(images: Images, size: int) -> Iterator[np.ndarray]:
    """Yield blocks of images as float32 in [0, 1], in order.

    Not through tf.data: its threads compete with a decoder that uses every core anyway.
    """
    for start in range(0, len(images), size):
        yield _scaled(images[start : start + size])


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels).astype(np.float32) / np.float32(255)


def draws_at_once(vae: VAE) -> int:
    """Return how many latents to decode together, by the decoder's largest feature map."""
    widest = max(math.prod(layer.output.shape[1:]) for layer in vae.decoder.layers)
    return max(1, (VALUES_PER_BLOCK_ON_GPU if has_gpu() else VALUES_PER_BLOCK) // widest)


def _compiled(vae: VAE) -> Callable[..., Any]:
    """Compile the costly part as one graph, traced once for blocks of all sizes.

    Takes images, the posterior and noise `(samples, batch, latent_dim)`; gives the sum over the
    samples of the log likelihoods and of the prior's corrections, and the log of the sum of the
    weights and of their squares, each `(batch,)`.
    """

    def decode(images: Any, mean: Any, log_variance: Any, noise: Any) -> Any:
        latents = objective.reparameterise(mean, log_variance, noise)
        log_likelihood = vae.log_likelihood(images, latents)
        correction = vae.prior.correction(latents)
        log_weights = objective.log_importance_weights(
            log_likelihood, latents, mean, log_variance, prior_correction=correction
        )
        sums = ops.sum(log_likelihood, axis=0), ops.sum(correction, axis=0)
        return *sums, *(ops.logsumexp(power * log_weights, axis=0) for power in (1, 2))

    latent = (None, vae.config.latent_dim)
    shapes = ((None, *vae.config.image_shape), latent, latent, (None, *latent))
    return backend().compiled(vae, decode, shapes)


def _sum_block(
    encode: Callable[..., Any],
    decode: Callable[..., Any],
    images: np.ndarray,
    samples: int,
    noise: Iterator[np.ndarray],
    progress: Progress,
) -> _Sums:
    """Add up the draws of a block of images, as many at a time as come of the noise."""
    posterior = encode(images)
    mean, log_variance = posterior["mean"], posterior["log_variance"]
    # In double precision: thousands of terms are added up.
    log_likelihood, correction = np.zeros(len(images)), np.zeros(len(images))
    logs = np.full((2, len(images)), -np.inf)  # of the weights, and of their squares
    drawn = 0
    while drawn < samples:
        draws = next(noise)
        added, corrected, *logs_added = map(
            ops.convert_to_numpy, decode(images, mean, log_variance, draws)
        )
        log_likelihood += added
        correction += corrected
        logs = np.logaddexp(logs, logs_added)
        drawn += len(draws)
        progress.advance(len(draws) * len(images))
    means, log_variances = map(ops.convert_to_numpy, (mean, log_variance))
    return _Sums(log_likelihood, correction, logs[0], logs[1], means, log_variances)


def active_units(means: np.ndarray, spread: np.ndarray | float = 1.0) -> np.ndarray:
    """Find latent dimensions that carry information: Var_x E_q[t] > 0.01 (Burda et al. 2016, 5.2).

    Args:
        means: posterior means, `(images, latent_dim)`.
        spread: from `latent_spread`.

    Returns:
        Booleans, `(latent_dim,)`.
    """
    return means.var(axis=0) > ACTIVE_VARIANCE * np.square(spread)


def latent_spread(vae: VAE, bounds: Bounds) -> np.ndarray:
    """Return each latent dimension's standard deviation, `(latent_dim,)`.

    One under N(0, I), as the prior has it. A learned prior follows whatever scale the latents have
    come to: there it is that of the images' latents, Var_x E_q[t] + E_x Var_q[t], whose root it is.
    """
    if vae.config.prior == "standard":
        return np.ones(vae.config.latent_dim)
    return np.sqrt(bounds.means.var(axis=0) + np.exp(bounds.log_variances).mean(axis=0))


def compute_scores(vae: VAE, images: Images) -> np.ndarray:
    """Compute the score of each image, from the draws that a service makes by default.

    Args:
        vae: the model.
        images: uint8, `(images, height, width, channels)`.

    Returns:
        Nats, float32 `(images,)`; larger is stranger.
    """
    noise = score_noise(vae)
    score = backend().compiled(
        vae, lambda pixels: -vae.terms(pixels, noise).elbo, [(None, *vae.config.image_shape)]
    )
    at_once = max(1, draws_at_once(vae) // SCORE_SAMPLES)
    blocks = scaled_blocks(images, at_once)
    return np.concatenate([ops.convert_to_numpy(score(pixels)) for pixels in blocks])


def score_noise(vae: VAE) -> np.ndarray:
    """Return the draws that a service makes by default, `(samples, 1, latent_dim)`.

    The same for every image, as in Bundle.score: a score does not depend on its neighbours.
    """
    shape = (SCORE_SAMPLES, 1, vae.config.latent_dim)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def quantiles(scores: np.ndarray) -> Mapping[str, float]:
    """Return the score that a share of the images stays below: share, "0" to "1", to nats."""
    return {f"{level:g}": float(np.quantile(scores, level)) for level in LEVELS}


def keep_reference(path: Path, vae: VAE, images: np.ndarray, scores: np.ndarray, seed: int) -> None:
    """Write what drift is measured against: latent means and scores of some images.

    Args:
        path: the file to write.
        vae: the model.
        images: uint8, `(images, height, width, channels)`; 5,000 of them at most are taken.
        scores: of all of them, `(images,)`.
        seed: of the choice.
    """
    size = min(REFERENCE_IMAGES, len(images))
    rows = np.sort(np.random.default_rng(seed).choice(len(images), size, replace=False))
    write_reference(path, posterior_means(vae, images[rows]), scores[rows])


def posterior_means(vae: VAE, images: Images) -> np.ndarray:
    """Return the means of q(t|x), `(images, latent_dim)`."""
    means = [
        ops.convert_to_numpy(vae.encoder(pixels)["mean"])
        for pixels in scaled_blocks(images, draws_at_once(vae))
    ]
    return np.concatenate(means)
