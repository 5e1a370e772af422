"""A look at a data set: some images of each split, and statistics of their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vaeflow.config import Prepare
from vaeflow.data.splits import SPLITS
from vaeflow.data.survey import Survey, data_blocks
from vaeflow.errors import DataError
from vaeflow.files import atomic_file
from vaeflow.pictures import grid, sections, write_png
from vaeflow.workspace import Workspace

LEVELS = 256


class Glance:
    """Random images of one split, and a histogram of all its pixels.

    Attributes:
        count: images seen.
        images: at most `shown` of them, each as likely as any other.
        histogram: pixels by channel and value, `(channels, 256)`.
    """

    def __init__(self, shown: int, shape: tuple[int, ...], generator: np.random.Generator):
        self.count = 0
        self.images = np.empty((0, *shape), np.uint8)
        self.histogram = np.zeros((shape[-1], LEVELS), np.int64)
        self._shown = shown
        self._lots = np.empty(0)
        self._generator = generator

    def add(self, pixels: np.ndarray) -> None:
        """Take in a block, uint8 `(count, *shape)`."""
        self.count += len(pixels)
        for channel, counts in enumerate(self.histogram):
            counts += np.bincount(pixels[..., channel].ravel(), minlength=LEVELS)
        # Every image draws a lot; those with the smallest stay.
        lots = np.concatenate([self._lots, self._generator.random(len(pixels))])
        kept = np.argsort(lots)[: self._shown]
        mine, new = kept[kept < len(self._lots)], kept[kept >= len(self._lots)] - len(self._lots)
        self.images = np.concatenate([self.images[mine], pixels[new]])
        self._lots = np.concatenate([lots[mine], lots[new + len(self._lots)]])

    def lines(self, name: str) -> Iterator[str]:
        """Count and, for each channel, statistics of its values 0..255, as a table's rows."""
        values = np.arange(LEVELS)
        for channel, counts in enumerate(self.histogram):
            present, shares = np.flatnonzero(counts), counts / counts.sum()
            mean = shares @ values
            deviation = np.sqrt(shares @ np.square(values - mean))
            yield (
                f"{name:<11}{self.count:>10,}{channel:>9}{present[0]:>5}{present[-1]:>5}"
                f"{mean:>8.2f}{deviation:>8.2f}{shares[0]:>8.1%}{shares[-1]:>8.1%}"
            )


HEADER = (
    f"{'split':<11}{'images':>10}{'channel':>9}{'min':>5}{'max':>5}"
    f"{'mean':>8}{'std':>8}{'at 0':>8}{'at 255':>8}"
)


def show(workspace: Workspace, parameters: Prepare, out: Path, shown: int, seed: int) -> list[str]:
    """Write a contact sheet of `data/` as a PNG: random images of each split.

    Args:
        workspace: whose `data/`.
        parameters: of `prepare`, which decide the splits.
        out: the file to write.
        shown: images of each split at most.
        seed: of the choice.

    Returns:
        A table of pixel statistics, line by line.
    """
    survey = Survey(parameters)
    generator = np.random.default_rng(seed)
    glances: dict[str, Glance] = {}
    for block in data_blocks(workspace, parameters):
        splits = survey.add(block)
        for name in SPLITS:
            if name not in glances:
                glances[name] = Glance(shown, block.pixels.shape[1:], generator)
            glances[name].add(block.pixels[splits == name])
    survey.check_splits()
    sheets = {
        f"{name}: {len(glance.images)} of {glance.count:,}": grid(glance.images)
        for name, glance in glances.items()
    }
    try:
        with atomic_file(out) as fresh:
            write_png(fresh, sections(sheets))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from None
    return [HEADER, *(line for name, glance in glances.items() for line in glance.lines(name))]
