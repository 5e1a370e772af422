"""The networks that contestants train: those of `presets/mnist*.yaml`, and tiny ones for a trial.

Sizes as `vaeflow.config.model.VAEConfig` names them; every contestant builds the same layers.
"""

SHAPE = (28, 28, 1)
NETWORKS = {
    "conv": {
        "network": "conv",
        "filters": (32, 64),
        "depth": 1,
        "hidden_units": 512,
        "latent_dim": 40,
    },
    "residual": {
        "network": "residual",
        "filters": (64, 128),
        "depth": 2,
        "hidden_units": 512,
        "latent_dim": 40,
    },
}
TINY = {"filters": (4, 8), "depth": 1, "hidden_units": 16, "latent_dim": 4}
NETWORKS |= {f"tiny-{name}": {**sizes, **TINY} for name, sizes in NETWORKS.items()}
