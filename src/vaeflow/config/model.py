"""The parameters of a VAE: the one place with their meaning, their defaults and their rules.

`params.yaml` has them in its section `train` (see `vaeflow.config.schema`), and a `.keras` file
keeps them.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

# Or a function of one's own, by its address; see `vaeflow.model.own`.
Network = Literal["conv", "residual"]
OWN_NETWORK = re.compile(r"networks(\.\w+)*:[A-Za-z_]\w*")
Likelihood = Literal["bernoulli", "gaussian", "discretized_logistic", "mixture_logistic"]
Binarize = Literal["none", "static", "dynamic"]
Objective = Literal["elbo", "importance_weighted"]
Prior = Literal["standard", "flow"]
CHOICES = {
    "likelihood": Likelihood,
    "binarize": Binarize,
    "objective": Objective,
    "prior": Prior,
}


@dataclass(frozen=True)
class VAEConfig:
    """The parameters of a `vaeflow.model.vae.VAE`.

    Attributes:
        image_shape: `(height, width, channels)`.
        latent_dim: size of the latent t.
        filters: channels of each level of the encoder, which halves the image; the decoder mirrors
            them.
        hidden_units: width of the dense layer between convolutions and latent, on both sides.
        network: `conv` or `residual`, see `vaeflow.model.networks`; or `networks.module:function`,
            of one's own, which `filters`, `depth` and `hidden_units` mean nothing to.
        depth: convolutions or residual blocks at each level.
        likelihood: p(x|t); see `vaeflow.model.likelihoods`.
        levels: values that a pixel may have, evenly spaced from 0 to 1; of the logistic ones.
        mixtures: components of `mixture_logistic`.
        binarize: `dynamic` draws black and white training images anew in every step; `static` and
            `none` leave what is given as it is. Kept with the model, to evaluate it likewise.
        prior: p(t), `standard` for N(0, I) or `flow`, learned; see `vaeflow.model.prior`.
        prior_couplings: of the flow.
        prior_hidden_units: of each of them.
        objective: `elbo`, or `importance_weighted` with the doubly reparameterised gradient.
        samples: draws of t per image in training and validation.
        beta: weight of the KL term.
        kl_warmup_steps: training steps over which that weight rises from 0.
        free_bits: nats per image and latent dimension that cost nothing, of the KL from N(0, 1);
            for `elbo` only.
        gradient_clip: a gradient with a larger norm is scaled down to it, in the unit of
            `gradient_limit`; 0 for none.
        gradient_limit: a step is left out whose gradient has a norm larger than this, in nats per
            pixel and channel: so one limit serves images of any size.
        seed: of the noise drawn in training and validation.

    Raises:
        ValueError: a value is none of the choices, or two do not go together.
    """

    image_shape: tuple[int, int, int]
    latent_dim: int = 8
    filters: tuple[int, ...] = (32, 64)
    hidden_units: int = 128
    _: KW_ONLY
    network: str = "conv"
    depth: int = 1
    likelihood: Likelihood = "bernoulli"
    levels: int = 256
    mixtures: int = 5
    binarize: Binarize = "none"
    prior: Prior = "standard"
    prior_couplings: int = 8
    prior_hidden_units: int = 128
    objective: Objective = "elbo"
    samples: int = 1
    beta: float = 1.0
    kl_warmup_steps: int = 0
    free_bits: float = 0.0
    gradient_clip: float = 0.0
    gradient_limit: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        # A file has lists where there were tuples.
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        object.__setattr__(self, "filters", tuple(self.filters))
        check_network(self.network)
        for name, choices in CHOICES.items():
            value, allowed = getattr(self, name), get_args(choices)
            if value not in allowed:
                own = ", or networks.module:function, of your own" * (name == "network")
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}{own}.")
        if self.binarize != "none" and self.likelihood != "bernoulli":
            raise ValueError(
                f"binarize must be none with likelihood {self.likelihood}; "
                f"{self.binarize} needs likelihood: bernoulli"
            )
        if self.free_bits and self.objective != "elbo":
            raise ValueError(
                f"free_bits must be 0 with objective {self.objective}, which has no KL term to "
                "floor; or choose objective: elbo"
            )


def check_network(network: str) -> str:
    """Return the name or address of a network.

    Raises:
        ValueError: it is neither.
    """
    if network not in get_args(Network) and not OWN_NETWORK.fullmatch(network):
        raise ValueError(
            f"expected one of {', '.join(get_args(Network))}, or networks.module:function, of your "
            "own, in src/networks"
        )
    return network
