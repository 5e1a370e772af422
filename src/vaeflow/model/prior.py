"""The prior p(t) of the latent: N(0, I), or a normalising flow that is learned with the networks.

Both say how much log p(t) differs from log N(t; 0, I), and turn draws of N(0, I) into draws of p.
That difference, the correction, is all that the objective needs beside the lecture's closed form:

    KL(q || p) = KL(q || N(0, I)) - E_q[log p(t) - log N(t; 0, I)]

The first term is exact; the second has no closed form, and the draws of t that the likelihood is
estimated from estimate it without bias. It is zero for N(0, I), and as long as a flow has learned
nothing; so the estimate varies far less than one of E_q[log p(t)] would.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from vaeflow.config.model import VAEConfig
from vaeflow.model.objective import Tensor

# Of the logarithm of what one coupling, or one linear map, stretches a dimension by.
LARGEST_LOG_SCALE = 2.0


def build_prior(config: VAEConfig) -> StandardPrior | FlowPrior:
    """Build the prior that a model's parameters ask for."""
    if config.prior == "standard":
        return StandardPrior(name="prior", dtype="float32")
    return FlowPrior(
        config.latent_dim,
        config.prior_couplings,
        config.prior_hidden_units,
        name="prior",
        dtype="float32",
    )


@keras.saving.register_keras_serializable(package="vaeflow")
class StandardPrior(layers.Layer):
    """N(0, I): nothing is learned."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.built = True

    def correction(self, latents: Tensor) -> Tensor:
        """Return log p(t) - log N(t; 0, I) of latents `(..., latent_dim)`: zeros, `(...)`."""
        return ops.zeros_like(latents[..., 0])

    def sample(self, noise: Tensor) -> Tensor:
        """Return draws of N(0, I) as they are."""
        return noise


@keras.saving.register_keras_serializable(package="vaeflow")
class FlowPrior(keras.Model):
    """RealNVP over the latent (Dinh et al. 2017): an exact density, and exact draws.

    A draw of N(0, I) goes through `couplings` pairs of an affine coupling and an invertible linear
    map. A coupling leaves one half of the dimensions as they are and shifts and stretches the
    other by what a network of one hidden layer makes of the first; the halves take turns. The
    linear map is a product of triangular matrices (Kingma & Dhariwal 2018), so that its determinant
    is the product of what it stretches by. What is stretched is bounded on both sides, and the flow
    begins as the identity: p begins as N(0, I).

    Calling it with a dict of `latents` and `noise`, each `(batch, latent_dim)`, of batches that
    need not be as large, gives a dict of `log_density`, `(batch,)` in nats, and `sample`.

    Args:
        latent_dim: of the latent.
        couplings: how many pairs.
        hidden_units: of each coupling's network.
    """

    def __init__(self, latent_dim: int, couplings: int, hidden_units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.latent_dim = latent_dim
        self.couplings = couplings
        self.hidden_units = hidden_units

        def weight(name: str, *shape: int, spread: float = 0.0) -> Any:
            start = keras.initializers.RandomNormal(stddev=spread) if spread else "zeros"
            return self.add_weight(name=name, shape=(couplings, *shape), initializer=start)

        # One array holds all couplings' weights: few variables keep the optimizer's step short.
        spread = latent_dim**-0.5
        self.hidden_kernel = weight("hidden_kernel", latent_dim, hidden_units, spread=spread)
        self.hidden_bias = weight("hidden_bias", hidden_units)
        self.kernel = weight("kernel", hidden_units, 2 * latent_dim)
        self.bias = weight("bias", 2 * latent_dim)
        self.lower = weight("lower", latent_dim, latent_dim)
        self.upper = weight("upper", latent_dim, latent_dim)
        self.log_scale = weight("log_scale", latent_dim)
        self.shift = weight("shift", latent_dim)
        first_half = np.arange(latent_dim) < latent_dim // 2
        # What a coupling changes; of one dimension, in every other coupling, that one.
        self.changed = [
            np.float32(first_half if index % 2 else ~first_half) for index in range(couplings)
        ]
        self.built = True

    def correction(self, latents: Tensor) -> Tensor:
        """Compute log p(t) - log N(t; 0, I).

        Args:
            latents: `(..., latent_dim)`.

        Returns:
            Nats, `(...)`.
        """
        normal, log_determinant = self.to_normal(latents)
        squares = ops.sum(ops.square(latents) - ops.square(normal), axis=-1)
        return log_determinant + 0.5 * squares

    def to_normal(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Turn draws of p into draws of N(0, I).

        Args:
            latents: `(..., latent_dim)`.

        Returns:
            The draws, of the same shape, and the log determinant of how they depend on the latents,
            `(...)`.
        """
        lower, upper = self._triangular()
        log_scales = _bound(self.log_scale)
        maps = ops.matmul(lower, upper * ops.exp(log_scales)[:, None, :])
        x = latents
        log_determinant = ops.sum(log_scales)
        for index in range(self.couplings):
            x = ops.matmul(x, maps[index]) + self.shift[index]
            log_scale, shift = self._couple(index, x)
            x = (x - shift) * ops.exp(-log_scale)
            log_determinant = log_determinant - ops.sum(log_scale, axis=-1)
        return x, log_determinant

    def sample(self, noise: Tensor) -> Tensor:
        """Turn draws of N(0, I) into draws of p, `(..., latent_dim)`."""
        lower, upper = self._triangular()
        back = ops.matmul(
            ops.exp(-_bound(self.log_scale))[:, :, None] * _inverse(upper), _inverse(lower)
        )
        x = noise
        for index in reversed(range(self.couplings)):
            # What a coupling reads it leaves as it is: there it reads what it read before.
            log_scale, shift = self._couple(index, x)
            x = x * ops.exp(log_scale) + shift
            x = ops.matmul(x - self.shift[index], back[index])
        return x

    def call(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute both directions; see the class."""
        latents = inputs["latents"]
        normal, log_determinant = self.to_normal(latents)
        constant = 0.5 * self.latent_dim * np.log(2 * np.pi)
        log_density = log_determinant - 0.5 * ops.sum(ops.square(normal), axis=-1) - constant
        return {"log_density": log_density, "sample": self.sample(inputs["noise"])}

    def _couple(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return by what a coupling stretches, in logarithms, and shifts each dimension."""
        changed = self.changed[index]
        hidden = ops.matmul(x * (1 - changed), self.hidden_kernel[index]) + self.hidden_bias[index]
        found = ops.matmul(keras.activations.silu(hidden), self.kernel[index]) + self.bias[index]
        log_scale, shift = ops.split(found, 2, axis=-1)
        return _bound(log_scale) * changed, shift * changed

    def _triangular(self) -> tuple[Tensor, Tensor]:
        """Return the unit lower and upper matrices, `(couplings, latent_dim, latent_dim)`."""
        below = np.tril(np.ones((self.latent_dim, self.latent_dim), np.float32), -1)
        one = np.eye(self.latent_dim, dtype=np.float32)
        return self.lower * below + one, self.upper * below.T + one

    def get_config(self) -> dict[str, Any]:
        """Return every constructor value."""
        ours = ("latent_dim", "couplings", "hidden_units")
        return {**super().get_config(), **{name: getattr(self, name) for name in ours}}


def _bound(log_scale: Tensor) -> Tensor:
    return LARGEST_LOG_SCALE * ops.tanh(log_scale / LARGEST_LOG_SCALE)


def _inverse(unit_triangular: Tensor) -> Tensor:
    """Invert I + N, where N is triangular without a diagonal, by products alone.

    A power of N as high as its size is zero, so that the series 1 - N + N^2 - ... ends; and it is
    the product of 1 + (-N)^(2^j). ONNX has no operation that solves equations.

    Args:
        unit_triangular: `(..., size, size)`.
    """
    size = unit_triangular.shape[-1]
    one = np.eye(size, dtype=np.float32)
    power = one - unit_triangular
    inverse = one + power
    for _ in range(1, max(1, (size - 1).bit_length())):
        power = ops.matmul(power, power)
        inverse = inverse + ops.matmul(inverse, power)
    return inverse
