"""What a model makes of the test images, computed once for all parts of the page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from vaeflow.bundle.runtime import Bundle, Detection
from vaeflow.data.splits import evenly, load_split, read_labels, read_sources

MOST_JUDGED = 5_000  # test images


class Judged(NamedTuple):
    """Test images, at most `MOST_JUDGED`, evenly from all.

    Attributes:
        images: uint8, `(count, height, width, channels)`.
        names: where each came from.
        labels: text, `(count,)`; None where the images have none.
        latents: posterior means, float32 `(count, latent_dim)`.
        score: minus the ELBO, nats, `(count,)`.
        found: None where the bundle has no anomaly measure.
    """

    images: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    latents: np.ndarray
    score: np.ndarray
    found: Detection | None

    @classmethod
    def by(cls, bundle: Bundle, prepared: Path) -> Self | None:
        """Judge them; None where `prepare` has left none."""
        if not (prepared / "test.npy").is_file():
            return None
        test = load_split(prepared, "test")
        rows = evenly(len(test), MOST_JUDGED)
        images = np.asarray(test[rows])
        sources, labels = read_sources(prepared, "test"), read_labels(prepared, "test")
        found = bundle.detect(images) if bundle.detects else None
        return cls(
            images,
            [sources[row] for row in rows.tolist()],
            None if labels is None else labels[rows],
            bundle.encode(images).mean,
            bundle.score(images) if found is None else found.score,
            found,
        )

    def some(self, most: int) -> Self:
        """Return `most` of them at most, evenly from all."""
        rows = evenly(len(self.images), most)
        found = self.found and Detection(*(values[rows] for values in self.found[:4]))
        labels = None if self.labels is None else self.labels[rows]
        names = [self.names[row] for row in rows.tolist()]
        return type(self)(
            self.images[rows], names, labels, self.latents[rows], self.score[rows], found
        )
