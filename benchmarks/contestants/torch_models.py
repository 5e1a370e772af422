"""The same network in PyTorch, as its examples train: eager, and through `torch.compile`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

LATENT_DIM, HIDDEN = 40, 512


def make(name: str, batch_size: int, precision: str):
    """The contestant of that name."""
    return Torch(batch_size, precision, compiled=name == "torch-compile")


class Network(nn.Module):
    """vaeflow's `conv` network of `presets/mnist.yaml`, layer by layer."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(7 * 7 * 64, HIDDEN),
            nn.SiLU(),
        )
        self.mean = nn.Linear(HIDDEN, LATENT_DIM)
        self.log_variance = nn.Linear(HIDDEN, LATENT_DIM)
        self.up = nn.Sequential(
            nn.Linear(LATENT_DIM, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 7 * 7 * 64),
            nn.SiLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 64, 3, 2, 1, output_padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 4, 3, 1, 1),
            nn.PixelShuffle(2),
        )

    def forward(self, images):
        """Minus the ELBO, mean over the images, nats."""
        features = self.down(images)
        mean = self.mean(features)
        log_variance = 12 * torch.tanh(self.log_variance(features) / 12)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        logits = self.up(latents).float()
        cross_entropy = functional.binary_cross_entropy_with_logits(logits, images, reduction="sum")
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (cross_entropy + kl) / len(images)


class Torch:
    """Adam at 0.001, batches shuffled and drawn black and white on the device."""

    def __init__(self, batch_size: int, precision: str, *, compiled: bool):
        self.batch_size, self.compiled = batch_size, compiled
        gpu = torch.cuda.is_available()
        self.target = torch.device("cuda" if gpu else "cpu")
        self.device = f"GPU: {torch.cuda.get_device_name()}" if gpu else "CPU"
        self.autocast = precision == "mixed_bfloat16"
        self.reset()

    def reset(self) -> None:
        """Untrained."""
        torch.manual_seed(0)
        self.network = Network().to(self.target)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.001)
        self.loss = torch.compile(self.network) if self.compiled else self.network

    def reset_for_bound(self) -> dict:
        """The same: none of its settings are chosen for that."""
        self.reset()
        return {}

    def train(self, images: np.ndarray, epochs: int) -> None:
        """Batches of one size only, lest `torch.compile` begin anew for the last."""
        pixels = torch.from_numpy(images).to(self.target)
        for _ in range(epochs):
            order = torch.randperm(len(pixels), device=self.target)
            for rows in order.split(self.batch_size):
                if len(rows) < self.batch_size:
                    break
                grey = pixels[rows].permute(0, 3, 1, 2).float() / 255
                self.optimizer.zero_grad()
                loss = self._loss(torch.bernoulli(grey))
                loss.backward()
                self.optimizer.step()
        loss.item()  # all of it is done

    def images(self, images: np.ndarray, epochs: int) -> int:
        """How many `train` has seen."""
        return epochs * (len(images) // self.batch_size * self.batch_size)

    def elbo(self, images: np.ndarray) -> float:
        """Mean over images that are black and white, nats."""
        whole = len(images) // self.batch_size * self.batch_size
        with torch.no_grad():
            batches = torch.from_numpy(images[:whole]).split(self.batch_size)
            losses = [
                self._loss(batch.to(self.target).permute(0, 3, 1, 2).float() / 255).item()
                for batch in batches
            ]
        return -float(np.mean(losses))

    def device_memory_mb(self) -> float | None:
        """The most that was taken on the GPU; None without one."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.target.type == "cuda" else None

    def _loss(self, images):
        with torch.autocast(self.target.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(images)
