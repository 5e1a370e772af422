"""Write a page on a model: one HTML file that opens from disk, and needs nothing beside it.

It is made of the bundle, and of what the stages wrote where there is a workspace; what there is not
is left out. Names of images, labels and models stay text: the template escapes them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vaeflow.bundle.card import MEANINGS
from vaeflow.bundle.runtime import Bundle, Detection
from vaeflow.common.files import atomic_directory
from vaeflow.common.pictures import coloured, grid, interleaved, reddened, shrunk
from vaeflow.common.workspace import Workspace
from vaeflow.data.splits import SPLITS, evenly, load_split
from vaeflow.report.charts import Bar, Chart, bars, histogram, lines, said
from vaeflow.report.explorer import dimensions_by_kl, explorer
from vaeflow.report.judged import Judged

PAGE = "index.html"
VERDICT = "<!-- no verdict yet -->"  # where it goes, once there is one
SAMPLES, PAIRS, SHEET = 64, 24, 48  # images
ODDEST = 8  # and as many of the most usual
EDGE = 128  # pixels: larger images are shown smaller
DIMENSIONS = 24  # latent ones, by KL


@dataclass
class Picture:
    """An image of the page: where from, what a screen reader says, and what stands below it."""

    source: str
    alternative: str
    caption: str = ""


@dataclass
class Section:
    """A part of the page: text, then numbers, charts and pictures."""

    name: str
    title: str
    text: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: list[tuple[str, Chart]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    commands: str = ""


def write_report(out: Path, bundle: Bundle, workspace: Workspace | None = None) -> Path:
    """Write the page into a folder, which is replaced whole.

    Args:
        out: the folder.
        bundle, workspace: as for `page_of`.

    Returns:
        The page.
    """
    text = page_of(bundle, workspace)
    with atomic_directory(out) as folder:
        (folder / PAGE).write_text(text, encoding="utf-8")
    return out / PAGE


def page_of(bundle: Bundle, workspace: Workspace | None = None) -> str:
    """Make the page: HTML that needs nothing beside it.

    Args:
        bundle: of the model.
        workspace: whose outputs are about this model; None where there is none.
    """
    from jinja2 import Environment, PackageLoader

    judged = Judged.by(bundle, workspace.prepared) if workspace is not None else None
    sections = [section for section in _sections(bundle, judged, workspace) if section is not None]
    environment = Environment(
        loader=PackageLoader("vaeflow.report", "."), autoescape=True, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        manifest=bundle.manifest,
        sections=sections,
        explorer=explorer(bundle, judged, workspace),
    )


def with_verdict(text: str, outcome: str, checks: Mapping[str, str]) -> str:
    """Return a page that says in its beginning what the gate made of the model.

    Args:
        text: a page that `write_report` has written.
        outcome: a sentence.
        checks: what the gate looked at, and what it found.
    """
    facts = Markup("").join(
        Markup("<dt>{}</dt><dd>{}</dd>\n").format(name, found) for name, found in checks.items()
    )
    verdict = Markup(
        '<section aria-labelledby="verdict">\n<h2 id="verdict">What the gate says</h2>\n'
        "<p>{}</p>\n<dl>\n{}</dl>\n</section>"
    ).format(outcome, facts)
    return text.replace(VERDICT, verdict, 1)


def _sections(
    bundle: Bundle, judged: Judged | None, workspace: Workspace | None
) -> Iterator[Section | None]:
    yield _overview(bundle)
    if workspace is not None:
        yield _training(workspace)
    if judged is not None:
        yield _reconstructions(bundle, judged)
    yield _samples(bundle)
    if workspace is not None:
        yield _dimensions(workspace)
        yield _spoilt(workspace)
    if judged is not None:
        yield from _alarms(bundle, judged)
    if workspace is not None:
        yield _data(workspace)
    yield _lineage(bundle)


def _overview(bundle: Bundle) -> Section:
    manifest, metrics = bundle.manifest, bundle.manifest.metrics
    image = manifest.image
    rows = []
    for name, meaning in MEANINGS.items():
        if name in metrics:
            error = metrics.get(f"{name}_standard_error")
            margin = "" if error is None else f"± {error:.2g}"
            rows.append((name.replace("_", " "), said(metrics[name]), margin, meaning))
    return Section(
        "overview",
        "How good it is",
        "On test images, which it was never trained on. The margin is the standard error of the "
        "mean: how far it may be from that over all images of the kind.",
        facts=[
            ("images", f"{image.height} x {image.width}, {image.channels} channels"),
            ("likelihood", manifest.likelihood.replace("_", " ")),
            ("prior", "learned (RealNVP)" if manifest.prior == "flow" else "N(0, I)"),
            ("latent dimensions", f"{manifest.latent_dim}"),
            ("made", f"{manifest.created:%Y-%m-%d %H:%M} UTC"),
        ],
        header=("metric", "value", "margin", "meaning"),
        rows=rows,
    )


def _training(workspace: Workspace) -> Section | None:
    path = workspace.model / "history.csv"
    if not path.is_file():
        return None
    table = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
    names = {"elbo": "ELBO", "log_likelihood": "log likelihood", "kl": "KL"}
    charts = []
    for term, name in names.items():
        series = {
            label: (table["epoch"], table[prefix + term])
            for label, prefix in (("train", ""), ("validation", "validation_"))
            if prefix + term in (table.dtype.names or ())
        }
        charts.append((name, lines(f"{name} by epoch", "epoch", "nats per image", series)))
    return Section(
        "training",
        "How it was trained",
        "The ELBO is the log likelihood less the KL. Validation is of images that do no more than "
        "end the training.",
        charts=charts,
    )


def _reconstructions(bundle: Bundle, judged: Judged) -> Section:
    images = judged.some(PAIRS).images
    again = shrunk(bundle.reconstruct(images), EDGE)
    return Section(
        "reconstructions",
        "Reconstructions",
        "Test images, each above what the decoder makes of its posterior mean.",
        pictures=[
            _picture(
                interleaved(shrunk(images, EDGE), again),
                f"{len(images)} test images with their reconstructions below",
            )
        ],
    )


def _samples(bundle: Bundle) -> Section:
    return Section(
        "samples",
        "Samples",
        "Pixel means decoded from draws of the prior: images that there never were.",
        pictures=[
            _picture(
                grid(shrunk(bundle.sample(SAMPLES, 0), EDGE)),
                f"{SAMPLES} images drawn by the model",
            )
        ],
    )


def _dimensions(workspace: Workspace) -> Section | None:
    found = dimensions_by_kl(workspace)
    if not found:
        return None
    rows = [
        Bar(f"dimension {one.number}" + ("" if one.active else " (not in use)"), one.kl)
        for one in found[:DIMENSIONS]
    ]
    return Section(
        "dimensions",
        "What the latent dimensions carry",
        f"The KL from the prior, of the {len(rows)} of {len(found)} dimensions that carry most.",
        charts=[("", bars("KL by latent dimension", "nats per image", rows))],
    )


def _spoilt(workspace: Workspace) -> Section | None:
    path = workspace.evaluation / "spoilt.json"
    if not path.is_file():
        return None
    spoilt = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        Bar(kind["severity"], kind["auroc"], kind["standard_error"], kind["score_auroc"])
        for kind in spoilt["kinds"].values()
    ]
    return Section(
        "spoilt",
        "What it notices",
        f"{spoilt['images']:,} test images were spoilt in each of these ways. A bar is the chance "
        "that a spoilt image has the larger anomaly than one as it was (AUROC; 0.5 is chance), the "
        "mark is that of minus the ELBO alone.",
        charts=[("", bars("AUROC by way of spoiling", "AUROC of the anomaly", rows, 0.0, 1.0))],
    )


def _alarms(bundle: Bundle, judged: Judged) -> Iterator[Section]:
    """Say how test images are judged, and show the oddest and the most usual."""
    found, alarm = judged.found, bundle.manifest.anomaly
    if found is None or alarm is None:
        yield _unmeasured(judged)
        return
    spread = {
        "calibration": bundle.measure.calibration.anomalies,
        f"test, {len(judged.images):,} images": found.anomaly,
    }
    threshold = bundle.threshold()
    yield Section(
        "calibration",
        "When it raises an alarm",
        "The anomaly is about 1 for usual images. The threshold is where images that were kept "
        f"apart reach it at a rate of {alarm.false_alarm_rate:.2g}; of these test images "
        f"{found.anomalous.mean():.2%} do.",
        facts=[
            ("threshold", f"{threshold:.4g}"),
            ("rate of false alarms", f"{alarm.false_alarm_rate:.2g}"),
            ("images that calibrate", f"{alarm.images:,}"),
        ],
        charts=[("", histogram("anomaly of usual images", "anomaly", spread, threshold))],
    )
    order = np.argsort(-found.anomaly, kind="stable")
    for name, title, chosen in (
        ("oddest", "The most anomalous test images", order[:ODDEST]),
        ("plainest", "The most usual test images", order[::-1][:ODDEST]),
    ):
        yield Section(
            name,
            title,
            "Each with its reconstruction, and with red where it is unusual.",
            pictures=list(_with_maps(bundle, judged, found, chosen)),
        )


def _with_maps(
    bundle: Bundle, judged: Judged, found: Detection, chosen: np.ndarray
) -> Iterator[Picture]:
    some = judged.images[chosen]
    maps = bundle.detect(some, maps=True).maps
    assert maps is not None
    again = bundle.reconstruct(some)
    for row, image, made, heat in zip(chosen.tolist(), some, again, maps, strict=True):
        triple = np.stack([coloured(image), coloured(made), reddened(image, heat)])
        facts = f"anomaly {found.anomaly[row]:.3g}, p-value {found.p_value[row]:.3g}"
        yield _picture(
            grid(shrunk(triple, EDGE), columns=3),
            f"{judged.names[row]}: image, reconstruction, and where it is unusual",
            f"{judged.names[row]}: {facts}",
        )


def _unmeasured(judged: Judged) -> Section:
    return Section(
        "scores",
        "Scores",
        "Minus the ELBO of test images. This bundle has no anomaly measure: too few images were "
        "left to calibrate one, or it was made before there was one.",
        charts=[("", histogram("scores of test images", "score, nats", {"test": judged.score}))],
    )


def _data(workspace: Workspace) -> Section | None:
    path = workspace.prepared / "dataset.json"
    if not path.is_file():
        return None
    about: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    pictures = []
    for split in SPLITS:
        images = load_split(workspace.prepared, split)
        some = shrunk(np.asarray(images[evenly(len(images), SHEET)]), EDGE)
        pictures.append(
            _picture(
                grid(some, columns=12),
                f"{len(some)} images of {split}",
                f"{split}: {len(some)} of {len(images):,}",
            )
        )
    return Section(
        "data",
        "The images",
        "An image's content decides its split, and copies stay together; half of validation is "
        "kept apart to calibrate by.",
        facts=[
            *((name, f"{count:,}") for name, count in about["images"].items() if count),
            ("exact copies", f"{about['duplicates']:,}"),
        ],
        pictures=pictures,
    )


def _lineage(bundle: Bundle) -> Section:
    lineage = bundle.manifest.lineage
    commit = lineage.get("git_commit", "unknown")
    return Section(
        "lineage",
        "Where it came from",
        "What it was made of, and how to make it again.",
        facts=[("MLflow run", bundle.manifest.run_id), *sorted(lineage.items())],
        commands=f"git checkout {commit}\ndvc pull\ndvc repro",
    )


def _picture(pixels: np.ndarray, alternative: str, caption: str = "") -> Picture:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(Markup(source), alternative, caption)
