"""Write the sample data set: the 1,797 handwritten digits that scikit-learn ships.

    python scripts/make_digits.py data

writes `data/images.npy`, uint8 `(1797, 8, 8, 1)`, and `data/labels.npy`, uint8 `(1797,)`. The grey
levels 0..16 become 0..255 by rounding, so each can be told from the others. The same bytes are
written every time.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (CC BY 4.0); scikit-learn ships its test part.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def write_digits(folder: Path) -> None:
    """Write both arrays into `folder`."""
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", digits.target.astype(np.uint8))


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
