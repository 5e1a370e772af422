"""Image files, as people have them in a folder."""

import numpy as np
from PIL import Image


def photographs(folder, count, seed):
    """Pictures of 40 x 36, a bright square in each, and a file that is none."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 60, (36, 40, 3), dtype=np.uint8)
        row, column = random.integers(0, 24, 2)
        pixels[row : row + 12, column : column + 12] = random.integers(160, 255, 3)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no picture")
