"""The labels that came with the images, for colouring figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_labels(prepared: Path, split: str) -> np.ndarray | None:
    """Labels of a split in the order of its array, text `(images,)`; None where there are none.

    An image without a label among others that have one is labelled `none`.

    Args:
        prepared: the folder that `prepare` wrote.
        split: `train`, `validation` or `test`.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(
        prepared / "index.parquet", columns=["label"], filters=[("split", "=", split)]
    )
    labels = table["label"]
    if labels.null_count == len(labels):
        return None
    return labels.fill_null("none").to_numpy().astype(str)
