import numpy as np
import pytest

from vaeflow.common.files import write_json


@pytest.fixture
def prepared(digits, tmp_path):
    """What `prepare` writes, as far as training reads it."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    about = {"image_shape": [8, 8, 1], "levels": 17, "images": {"train": 200}}
    write_json(folder / "dataset.json", about)
    for name, rows in (("train", slice(0, 200)), ("validation", slice(200, 240))):
        np.save(folder / f"{name}.npy", digits[rows])
    (folder / "index.parquet").write_bytes(b"stands for the images' digests")
    return folder
