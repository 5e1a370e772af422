"""Mini-batches for training."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

STACK_BYTES = 2**26


class Batches(keras.utils.PyDataset):
    """Batches of uint8 images, read from `images` as they are needed; the model scales them.

    With a seed, each epoch has a permutation of its own, which depends on seed and epoch alone: so
    a training can go on in the middle of an epoch in the order that it began in.

    Args:
        images: uint8, `(count, height, width, channels)`, typically `StoredImages`; or a tensor
            that `vaeflow.model.device.keep_on_device` has made of them.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        shuffle_seed: of the permutations; without it the images keep their order.
        multiple_of: of how many images batches must be, as devices that share one need it: the last
            is filled up with the first images of the epoch.
        part: which process this is, from 0, and of how many that share each batch: only the rows of
            this one are read.
        at_once: how many whole batches to hand over as one, stacked on a new first axis; see
            `vaeflow.model.steps.jax.run`. Fewer, where they would be large.

    Examples:
        >>> vae.fit(Batches(images, 128, shuffle_seed=0), epochs=10, shuffle=False)
    """

    def __init__(
        self,
        images: Any,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        multiple_of: int = 1,
        part: tuple[int, int] = (0, 1),
        at_once: int = 1,
    ) -> None:
        super().__init__()
        self.images = images
        self.kept = keras.ops.is_tensor(images)
        self.batch_size = batch_size
        self.steps_per_epoch = math.ceil(len(images) / batch_size)
        self.whole = len(images) // batch_size  # batches that are full
        if not self.kept:
            at_once = min(at_once, STACK_BYTES // (batch_size * math.prod(images.shape[1:])))
        self.at_once = _even_share(self.whole, at_once)
        self.shuffle_seed = shuffle_seed
        self.multiple_of = multiple_of
        self.part = part
        self.feeds: dict[Any, Any] = {}
        self.at(epoch=0)

    def at(self, epoch: int, first: int = 0) -> Batches:
        """Return the batches of an epoch, from the one with index `batch` on.

        Inside `fit`, later epochs follow by themselves.
        """
        self.epoch, self.first, self.begun = epoch, first, False
        self.order = None
        if self.shuffle_seed is not None:
            generator = np.random.default_rng([self.shuffle_seed, epoch])
            self.order = generator.permutation(np.arange(len(self.images), dtype=np.uint32))
        return self

    def feed(self) -> Any:
        """Return the batches as the backend takes them fastest, for each `fit` or `evaluate`.

        Of images that TensorFlow keeps on a device it is the rows that are fed; the model picks
        them from `VAE.kept_images`.

        Keras would have TensorFlow tune the reading as it goes, and the thread that does so lets an
        epoch end only when it wakes up, after 2.5, 5, 10, 20 seconds and so on.
        """
        if keras.backend.backend() != "tensorflow":
            return self
        # To make one takes as long as a step or two of a small network, and epochs need the same.
        if self.first not in self.feeds:
            self.feeds[self.first] = self._dataset()
        return self.feeds[self.first]

    def _dataset(self) -> Any:
        import tensorflow as tf

        signature = tf.TensorSpec((None, *self.images.shape[1:]), tf.uint8)
        if self.kept:
            signature = tf.TensorSpec((None,), tf.int32)
        data = tf.data.Dataset.from_generator(self._epoch, output_signature=signature)
        options = tf.data.Options()
        options.autotune.enabled = False
        data = data.apply(tf.data.experimental.assert_cardinality(len(self)))
        return data.prefetch(2).with_options(options)

    def _epoch(self) -> Any:
        """Yield the batches of an epoch; each call begins the next."""
        self.on_epoch_begin()
        return (self[index] for index in range(len(self)))

    def steps_done(self, items: int) -> int:
        """Count the batches of the epoch that are behind when so many items have been taken."""
        return self.span(items - 1).stop if items else self.first

    def span(self, index: int) -> range:
        """Return which batches of the epoch an item has.

        Items end at multiples of `at_once` wherever the first begins: a training that goes on in
        the middle of an epoch is made by the same compiled programs.
        """
        number = self.first // self.at_once + index
        start = max(self.first, number * self.at_once)
        if start >= self.whole:  # the last images, which fill no batch
            return range(self.whole, self.steps_per_epoch)
        return range(start, min((number + 1) * self.at_once, self.whole))

    def __len__(self) -> int:
        stacks = math.ceil(self.whole / self.at_once) - self.first // self.at_once
        return stacks * (self.first < self.whole) + self.steps_per_epoch - self.whole

    def __getitem__(self, index: int) -> Any:
        span = self.span(index)
        rows = np.stack([self._rows(batch) for batch in span])
        if self.at_once == 1 or span.start == self.whole:
            rows = rows[0]
        if not self.kept:
            images = np.asarray(self.images[rows.reshape(-1)])
            return images.reshape(*rows.shape, *images.shape[1:])
        rows = rows.astype("int32")
        return rows if keras.backend.backend() == "tensorflow" else (rows, self.images)

    def _rows(self, batch: int) -> np.ndarray:
        """Return which images a batch has, of those that are this process's to read."""
        start = batch * self.batch_size
        places = np.arange(start, min(start + self.batch_size, len(self.images)))
        missing = -len(places) % self.multiple_of
        places = np.concatenate([places, np.arange(missing)])
        process, of = self.part
        size = len(places) // of
        places = places[process * size : (process + 1) * size]
        return places if self.order is None else self.order[places]

    def on_epoch_begin(self) -> None:
        """Begin an epoch; called by Keras."""
        if self.begun:
            self.at(self.epoch + 1)
        self.begun = True


def _even_share(steps: int, most: int) -> int:
    """Return into how many at a time to divide steps: a divisor, if one is not far below the most.

    What is left over at the end would be a program of its own, to compile.
    """
    most = max(1, min(steps, most))
    divisors = (count for count in range(most, max(1, most // 8), -1) if steps % count == 0)
    return next(divisors, most)
