"""The labels that came with the images, for colouring figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_labels(prepared: Path, split: str) -> np.ndarray | None:
    """Integer labels of a split in the order of its array, `(images,)`; None where there are none.

    Args:
        prepared: the folder that `prepare` wrote.
        split: `train`, `validation` or `test`.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(
        prepared / "index.parquet", columns=["label"], filters=[("split", "=", split)]
    )
    labels = table["label"]
    return None if labels.null_count else labels.to_numpy()
