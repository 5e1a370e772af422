"""Train a model of pythae with its networks for MNIST, and judge it; run in pythae's environment.

    python pythae_models.py vae|iwae IMAGES.npz MINUTES SAMPLES FOLDER

Its model, networks and loss, with the optimizer it has by default and a learning rate of 0.001;
every batch is drawn black and white anew, as those of the others are. Prints a line of JSON. The
bounds found so far are kept in the folder, and gone on with.
"""

from __future__ import annotations

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_VAE_MNIST
from torch.nn import functional

LATENT_DIM, BATCH_SIZE, DRAWN = 16, 128, 10
AT_ONCE = 500  # latents that are decoded together


def main() -> None:
    """Train or load, judge, print."""
    kind, images, minutes, samples, folder = sys.argv[1:]
    arrays = np.load(images)
    torch.manual_seed(0)
    sizes = {"input_dim": (1, 28, 28), "latent_dim": LATENT_DIM, "reconstruction_loss": "bce"}
    if kind == "iwae":
        config, make = IWAEConfig(**sizes, number_samples=DRAWN), IWAE
    else:
        config, make = VAEConfig(**sizes), VAE
    model = make(config, Encoder_Conv_VAE_MNIST(config), Decoder_Conv_AE_MNIST(config))
    kept = Path(folder) / "model.pt"
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state.pop("weights"))
        record = state
    else:
        record = train(model, torch.from_numpy(arrays["train"]), 60 * float(minutes))
        torch.save({**record, "weights": model.state_dict()}, kept)
    nats = bounds(model, torch.from_numpy(arrays["test"]), int(samples), Path(folder))
    print(
        json.dumps(
            {
                "nll": round(-float(nats.mean()), 4),
                "standard_error": round(float(nats.std(ddof=1) / math.sqrt(len(nats))), 4),
                "importance_samples": int(samples),
                "images": len(nats),
                **record,
                "parameters": sum(weight.numel() for weight in model.parameters()),
                "pythae": version("pythae"),
                "torch": torch.__version__,
                "settings": {
                    "latent_dim": LATENT_DIM,
                    "batch_size": BATCH_SIZE,
                    "learning_rate": 0.001,
                    **({"samples": DRAWN} if kind == "iwae" else {}),
                },
            }
        )
    )


def train(model, images, seconds: float) -> dict:
    """Train for some time; return what it came to."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    start, steps = time.perf_counter(), 0
    model.train()
    while True:
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            pixels = torch.bernoulli(images[rows].permute(0, 3, 1, 2).float() / 255)
            optimizer.zero_grad()
            model({"data": pixels}).loss.backward()
            optimizer.step()
            steps += 1
            spent = time.perf_counter() - start
            if spent >= seconds:
                seen = steps * BATCH_SIZE
                return {
                    "train_seconds": round(spent, 1),
                    "epochs": round(seen / len(images), 2),
                    "train_images_per_second": round(seen / spent),
                }


@torch.no_grad()
def bounds(model, images, samples: int, folder: Path) -> np.ndarray:
    """The importance-weighted bound of each image, nats."""
    model.eval()
    path = folder / f"bounds-{samples}.npy"
    found = list(np.load(path)) if path.exists() else []
    generator = torch.Generator().manual_seed(1 + len(found))
    for image in images[len(found) :]:
        pixels = image.permute(2, 0, 1)[None].float() / 255
        posterior = model.encoder(pixels)
        mean, log_variance = posterior.embedding, posterior.log_covariance
        log_weights = []
        for start in range(0, samples, AT_ONCE):
            noise = torch.randn(min(AT_ONCE, samples - start), LATENT_DIM, generator=generator)
            latents = mean + (0.5 * log_variance).exp() * noise
            decoded = model.decoder(latents)["reconstruction"]
            log_likelihood = -functional.binary_cross_entropy(
                decoded, pixels.expand_as(decoded), reduction="none"
            ).sum(dim=(1, 2, 3))
            log_ratio = 0.5 * (noise.square() + log_variance - latents.square()).sum(dim=1)
            log_weights.append(log_likelihood + log_ratio)
        found.append(float(torch.logsumexp(torch.cat(log_weights), 0)) - math.log(samples))
        if len(found) % 10 == 0:
            np.save(path, found)
            print(f"{len(found)} images: {-np.mean(found):.3f} nats", file=sys.stderr, flush=True)
    np.save(path, found)
    return np.array(found)


if __name__ == "__main__":
    main()
