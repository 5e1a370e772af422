"""Grey images as black and white ones: a pixel of level x is white with probability x / 255.

`static` draws each training image once, `dynamic` anew in every step (in `VAE.train_step`); what a
model is validated and tested on is drawn once under both, so that figures compare.
"""

from __future__ import annotations

import numpy as np

from vaeflow.data.stored import row_numbers


class Binarized:
    """A view of images as black and white, drawn as they are read, the same at every reading.

    An image's draw depends on the seed and on its index alone, so images may be read in any order
    and never need to be in memory together. Stands in for an array of images where these are
    counted, sliced or picked by an array of indices.

    Args:
        images: uint8, `(count, height, width, channels)`, typically memory-mapped.
        seed: of the draws.

    Example:
        >>> Binarized(images, seed=0)[[3, 5]]  # uint8, (2, height, width, channels), 0 and 255
    """

    def __init__(self, images: np.ndarray, seed: int):
        self.images = images
        self.seed = seed
        self.shape = images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows) -> np.ndarray:
        pixels = np.asarray(self.images[rows])
        thresholds = [self._thresholds(row) for row in row_numbers(rows, len(self))]
        # White for x of the 255 thresholds 0..254: never for 0, always for 255.
        white = pixels > np.reshape(thresholds, pixels.shape)
        return np.where(white, np.uint8(255), np.uint8(0))

    def _thresholds(self, index: int) -> np.ndarray:
        # A counter-based generator: the image's own stretch of it is reached without the rest.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, index]))
        return generator.integers(0, 255, self.shape[1:], dtype=np.uint8)


def binarized(images: np.ndarray, binarize: str, seed: int) -> np.ndarray | Binarized:
    """Images to validate or test on: drawn once, or as they are where `binarize` is `none`."""
    return images if binarize == "none" else Binarized(images, seed)
