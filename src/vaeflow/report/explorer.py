"""The latent explorer: what its part of the page holds, beside the scripts.

All of it is text inside the page, since a page that was opened from disk may fetch nothing: facts
as JSON, images in one sheet, and the decoder's files and its runtime packed.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import math
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from vaeflow.bundle.runtime import SCORE_SAMPLES, Bundle
from vaeflow.common.pictures import coloured, shrunk
from vaeflow.common.workspace import Workspace
from vaeflow.report.judged import Judged

MOST_BYTES = 64 * 2**20  # of ONNX files: a page of more is slow to open
THUMBNAIL = 64  # pixels: the longest edge
SHEET_PIXELS = 8_000_000  # of all thumbnails
SLIDERS = 64
LEAST_CHANGE = 0.02  # of the picture, beside what the dimension that changes it most does
RUNTIME = files("vaeflow.report") / "onnxruntime"
MODULE, BINARY = "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm.gz"
# In the order that they run in.
SCRIPTS = ("onnxruntime/ort.wasm.min.js", "model.js", "explorer.js")


@dataclass
class Explorer:
    """What the page's template puts in.

    Attributes:
        facts: for the scripts; the template writes them as JSON.
        packed: base64 of gzip, by the id of the element that holds it.
        scripts: their text.
        policy: the sources of scripts that the page allows.
        sprite: all thumbnails, the address of one image; None where there are no images.
        choices: what points can be coloured by.
    """

    facts: dict[str, Any]
    packed: dict[str, str]
    scripts: list[Markup]
    policy: str
    sprite: str | None = None
    choices: list[str] = field(default_factory=list)


def explorer(bundle: Bundle, judged: Judged | None, workspace: Workspace | None) -> Explorer | None:
    """Gather it; None for a model that is too large for a page.

    Args:
        bundle: the model.
        judged: test images for the map; None where there are none.
        workspace: that has its evaluation; None where there is none.
    """
    manifest = bundle.manifest
    names = ["encoder", "decoder"] + ["prior"] * (manifest.prior == "flow")
    models = {name: bundle.read_file(f"{name}.onnx") for name in names}
    if sum(map(len, models.values())) > MOST_BYTES:
        return None
    packed = {f"model-{name}": _packed(code) for name, code in models.items()}
    packed["ort-module"] = _packed((RUNTIME / MODULE).read_bytes())
    packed["ort-binary"] = _base64((RUNTIME / BINARY).read_bytes())
    scripts = [(files("vaeflow.report") / name).read_text(encoding="utf-8") for name in SCRIPTS]
    digests = [_base64(hashlib.sha256(script.encode()).digest()) for script in scripts]
    reading = manifest.image.reading
    facts = {
        **manifest.model_dump(include={"latent_dim", "likelihood", "levels", "mixtures", "prior"}),
        "image": manifest.image.model_dump(include={"height", "width", "channels"}),
        "resize": reading.resize if reading else "crop",
        "background": reading.background if reading else "#000000",
        "score_quantiles": [[float(s), v] for s, v in manifest.score_quantiles.items()],
        "draws": SCORE_SAMPLES,
    }
    found = Explorer(
        facts,
        packed,
        [Markup(script) for script in scripts],
        " ".join(f"'sha256-{digest}'" for digest in digests),
    )
    known = dimensions_by_kl(workspace)
    order = [one.number for one in known if one.active] or [one.number for one in known]
    order = order or _by_change(bundle)
    if judged is None:
        centre, spread = np.zeros(bundle.latent_dim), np.ones(bundle.latent_dim)
        axes = np.eye(bundle.latent_dim)[[order[0], order[min(1, len(order) - 1)]]]
        facts |= {"points": None, "plane": [centre.tolist(), *axes.tolist()]}
    else:
        centre, spread = judged.latents.mean(axis=0), judged.latents.std(axis=0)
        _add_points(found, judged)
    facts["dimensions"] = [
        {
            "dimension": dimension,
            "name": f"dimension {dimension}",
            "low": float(min(-3, centre[dimension] - 3 * spread[dimension])),
            "high": float(max(3, centre[dimension] + 3 * spread[dimension])),
        }
        for dimension in order[:SLIDERS]
    ]
    return found


def _add_points(found: Explorer, judged: Judged) -> None:
    """Add the test images: where they lie, what they are, and how they look."""
    height, width = shrunk(judged.images[:1], THUMBNAIL).shape[1:3]
    judged = judged.some(max(1, SHEET_PIXELS // (height * width)))
    small = coloured(shrunk(judged.images, THUMBNAIL))
    columns = math.ceil(math.sqrt(len(small) * height / width))
    numbers: dict[str, np.ndarray] = {"score": judged.score}
    if judged.found is not None:
        numbers["anomaly"] = judged.found.anomaly
    found.facts["points"] = {
        "latents": _base64(judged.latents.astype("<f4").tobytes()),
        "names": judged.names,
        "labels": None if judged.labels is None else judged.labels.tolist(),
        "sprite": {"columns": columns, "width": width, "height": height},
        **{name: np.round(values.astype(float), 4).tolist() for name, values in numbers.items()},
    }
    found.sprite = _sheet(small, columns)
    found.choices = ["label"] * (judged.labels is not None) + list(reversed(numbers))
    centre = judged.latents.mean(axis=0)
    _, _, directions = np.linalg.svd(judged.latents - centre, full_matrices=True)
    first = directions[[0, min(1, len(directions) - 1)]]
    found.facts["plane"] = [centre.tolist(), *first.tolist()]


class Dimension(NamedTuple):
    """A latent dimension, and what `evaluate` found of it: nats, and whether it is in use."""

    number: int
    kl: float
    active: bool


def dimensions_by_kl(workspace: Workspace | None) -> list[Dimension]:
    """Return all dimensions, those that carry most first; none where `evaluate` has left none."""
    if workspace is None:
        return []
    path = workspace.evaluation / "latent_dimensions.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        found = [
            Dimension(int(row["dimension"]), float(row["kl"]), row["active"] == "1")
            for row in csv.DictReader(file)
        ]
    return sorted(found, key=lambda dimension: -dimension.kl)


def _by_change(bundle: Bundle) -> list[int]:
    """Return the dimensions by how much they change the picture from the prior's mean."""
    away = 1.5 * np.eye(bundle.latent_dim, dtype=np.float32)
    change = np.abs(bundle.decode(away) - bundle.decode(-away)).mean(axis=(1, 2, 3))
    order = np.argsort(-change, kind="stable")
    return [int(d) for d in order if change[d] >= LEAST_CHANGE * change.max()]


def _sheet(images: np.ndarray, columns: int) -> str:
    """Return the address of one image of all, without gaps."""
    from PIL import Image

    count, height, width, _ = images.shape
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width, 3), np.uint8)
    padded[:count] = images
    sheet = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    file = io.BytesIO()
    picture = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    picture.save(file, "WEBP", quality=90, method=4)
    return f"data:image/webp;base64,{_base64(file.getvalue())}"


def _packed(content: bytes) -> str:
    # Without the time in it: the same model has the same page.
    return _base64(gzip.compress(content, 6, mtime=0))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
