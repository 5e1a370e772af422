"""The same network in PyTorch, as its best user would train it: eager, and compiled.

Channels last, Adam in one kernel, images that stay on the device. On a GPU `torch-compile` also
records a whole step as a CUDA graph, which is replayed with other rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from contestants.networks import SHAPE


def make(name: str, batch_size: int, precision: str, network: dict):
    """The contestant of that name."""
    return Torch(batch_size, precision, network, compiled=name == "torch-compile")


class Block(nn.Module):
    """Pre-activation residual block, the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x):
        """As vaeflow's."""
        return x + self.second(functional.silu(self.first(functional.silu(x))))


def layers_down(sizes: dict) -> list[nn.Module]:
    """From the image to the deepest feature map."""
    layers, before = [], SHAPE[-1]
    filters, depth = sizes["filters"], sizes["depth"]
    if sizes["network"] == "conv":
        for channels in filters:
            layers += [nn.Conv2d(before, channels, 3, 2, 1), nn.SiLU()]
            before = channels
        return layers
    layers.append(nn.Conv2d(before, filters[0], 3, padding=1))
    before = filters[0]
    for channels in filters:
        layers += [Block(before) for _ in range(depth)]
        layers.append(nn.Conv2d(before, channels, 3, 2, 1))
        before = channels
    return [*layers, *[Block(before) for _ in range(depth)], nn.SiLU()]


def layers_up(sizes: dict) -> list[nn.Module]:
    """From the deepest feature map to the logits."""
    layers, filters, depth = [], sizes["filters"], sizes["depth"]
    before = filters[-1]
    if sizes["network"] == "conv":
        for level in reversed(range(1, len(filters))):
            doubled = nn.ConvTranspose2d(before, filters[level], 3, 2, 1, output_padding=1)
            layers += [doubled, nn.SiLU()]
            before = filters[level]
        return [*layers, nn.Conv2d(before, 4 * SHAPE[-1], 3, padding=1), nn.PixelShuffle(2)]
    layers += [Block(before) for _ in range(depth)]
    for level in reversed(range(len(filters))):
        channels = filters[max(0, level - 1)]
        layers.append(nn.ConvTranspose2d(before, channels, 3, 2, 1, output_padding=1))
        layers += [Block(channels) for _ in range(depth)]
        before = channels
    return [*layers, nn.SiLU(), nn.Conv2d(before, SHAPE[-1], 3, padding=1)]


class Network(nn.Module):
    """vaeflow's network, layer by layer."""

    def __init__(self, sizes: dict):
        super().__init__()
        hidden, latent = sizes["hidden_units"], sizes["latent_dim"]
        edge, deepest = SHAPE[0] // 2 ** len(sizes["filters"]), sizes["filters"][-1]
        flat = edge * edge * deepest
        self.down = nn.Sequential(
            *layers_down(sizes), nn.Flatten(), nn.Linear(flat, hidden), nn.SiLU()
        )
        self.mean = nn.Linear(hidden, latent)
        self.log_variance = nn.Linear(hidden, latent)
        self.up = nn.Sequential(
            *(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, flat), nn.SiLU()),
            *(nn.Unflatten(1, (deepest, edge, edge)), *layers_up(sizes)),
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

    def __init__(self, batch_size: int, precision: str, network: dict, *, compiled: bool):
        self.batch_size, self.sizes, self.compiled = batch_size, network, compiled
        gpu = torch.cuda.is_available()
        self.target = torch.device("cuda" if gpu else "cpu")
        self.device = f"GPU: {torch.cuda.get_device_name()}" if gpu else "CPU"
        self.autocast = precision == "mixed_bfloat16"
        self.remarks = {}
        torch.set_float32_matmul_precision("high")  # TF32, as JAX and TensorFlow multiply
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.reset()

    def reset(self) -> None:
        """Untrained."""
        torch.manual_seed(0)
        self.network = Network(self.sizes).to(self.target, memory_format=torch.channels_last)
        graph = self.compiled and self.target.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=0.001, fused=True, capturable=graph
        )
        self.loss = torch.compile(self.network) if self.compiled else self.network
        self.pixels = self.graph = None

    def reset_for_bound(self) -> dict:
        """The same: none of its settings are chosen for that."""
        self.reset()
        return {}

    def train(self, images: np.ndarray, epochs: int) -> None:
        """Batches of one size only, lest `torch.compile` begin anew for the last."""
        self._keep(images)
        for _ in range(epochs):
            order = torch.randperm(len(images), device=self.target)
            for rows in order.split(self.batch_size):
                if len(rows) < self.batch_size:
                    break
                loss = self._step(rows)
        loss.item()  # all of it is done

    def images(self, images: np.ndarray, epochs: int) -> int:
        """How many `train` has seen."""
        return epochs * (len(images) // self.batch_size * self.batch_size)

    def elbo(self, images: np.ndarray) -> float:
        """Mean over images that are black and white, nats."""
        whole = len(images) // self.batch_size * self.batch_size
        with torch.no_grad():
            batches = torch.from_numpy(images[:whole]).split(self.batch_size)
            losses = [self._loss(self._scaled(batch.to(self.target))).item() for batch in batches]
        return -float(np.mean(losses))

    def device_memory_mb(self) -> float | None:
        """The most that was taken on the GPU; None without one."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.target.type == "cuda" else None

    def _keep(self, images: np.ndarray) -> None:
        """Have the images on the device; what a graph reads stays where it is."""
        if self.pixels is not None and self.given is images:
            return
        self.given = images
        fresh = torch.from_numpy(images).to(self.target)
        if self.pixels is not None and self.pixels.shape == fresh.shape:
            self.pixels.copy_(fresh)
            return
        self.pixels, self.graph = fresh, None
        if self.compiled and self.target.type == "cuda":
            self._record()

    def _record(self) -> None:
        """Record a step as a CUDA graph, or go on without, and say why."""
        self.rows = torch.arange(self.batch_size, device=self.target)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiled, and Adam's moments made
                    self._make(self.rows)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.recorded = self._make(self.rows)
            self.graph, self.remarks = graph, {"cuda_graph": True}
        except Exception as error:  # any: what PyTorch cannot record differs by version
            self.remarks = {"cuda_graph": False, "why": str(error)[:200]}

    def _step(self, rows):
        """The loss of a step that is made."""
        if self.graph is None:
            return self._make(rows)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.recorded

    def _make(self, rows):
        self.optimizer.zero_grad()
        loss = self._loss(torch.bernoulli(self._scaled(self.pixels[rows])))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @staticmethod
    def _scaled(pixels):
        """Channels first by name, last in memory, as they come."""
        return pixels.permute(0, 3, 1, 2).float() / 255

    def _loss(self, images):
        # Weights are cast in every step anyway, and a graph must not keep what it cast before.
        with torch.autocast(
            self.target.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        ):
            return self.loss(images)
