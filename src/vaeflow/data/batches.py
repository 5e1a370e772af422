"""Mini-batches for training, from memory-mapped arrays."""

from __future__ import annotations

import math

import keras
import numpy as np


class Batches(keras.utils.PyDataset):
    """Batches of uint8 images, read from `images` as they are needed; the model scales them.

    With a seed, each epoch has a permutation of its own, which depends on seed and epoch alone: so
    a training can go on in the middle of an epoch in the order that it began in.

    Args:
        images: uint8, `(count, height, width, channels)`, typically memory-mapped.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        shuffle_seed: of the permutations; without it the images keep their order.
        multiple_of: of how many images batches must be, as devices that share one need it: the last
            is filled up with the first images of the epoch.

    Example:
        >>> vae.fit(Batches(images, 128, shuffle_seed=0), epochs=10, shuffle=False)
    """

    def __init__(
        self,
        images: np.ndarray,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        multiple_of: int = 1,
    ):
        super().__init__()
        self.images = images
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.multiple_of = multiple_of
        self.at(epoch=0)

    def at(self, epoch: int, first: int = 0) -> Batches:
        """Itself, giving the batches of an epoch from the one with that index on.

        Inside `fit`, later epochs follow by themselves.
        """
        self.epoch, self.first, self.begun = epoch, first, False
        self.order = None
        if self.shuffle_seed is not None:
            generator = np.random.default_rng([self.shuffle_seed, epoch])
            self.order = generator.permutation(np.arange(len(self.images), dtype=np.uint32))
        return self

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size) - self.first

    def __getitem__(self, index: int) -> np.ndarray:
        start = (self.first + index) * self.batch_size
        batch = self._read(start, start + self.batch_size)
        missing = -len(batch) % self.multiple_of
        return np.concatenate([batch, self._read(0, missing)]) if missing else batch

    def _read(self, start: int, end: int) -> np.ndarray:
        rows = slice(start, end)
        return np.asarray(self.images[rows if self.order is None else self.order[rows]])

    def on_epoch_begin(self) -> None:
        """Called by Keras."""
        if self.begun:
            self.at(self.epoch + 1)
        self.begun = True
