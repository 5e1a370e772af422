"""The scoring flow: a batch is scored and compared with the validation images."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Drift, load_parameters
from vaeflow.orchestration.prefect import result_of, without_traceback
from vaeflow.scoring.drift import DRIFT_DETECTED, emit_drift, measure_drift, summary
from vaeflow.scoring.images import Asked
from vaeflow.scoring.score import Batch, Scored
from vaeflow.scoring.score import score as score_batch


@task(task_run_name="score")
@without_traceback
def score_images(batch: Batch) -> Scored:
    """Score the batch; a run that was killed goes on where it was."""
    return score_batch(batch)


@task(task_run_name="drift")
@without_traceback
def compare(scored: Scored, thresholds: Drift) -> dict[str, Any]:
    """Compare the scores with the reference in the very bundle that gave them."""
    report = measure_drift(
        scored.out, str(scored.bundle), scored.out.with_suffix(".drift.json"), thresholds
    )
    if report["drifted"] and emit_drift(report):
        print(f"event {DRIFT_DETECTED} sent")
    return report


@flow(name="score", log_prints=True)
@without_traceback
def score(
    sources: list[str],
    model: str,
    out: str = "outputs/scores.parquet",
    resize: str | None = None,
    skip_bad: bool = False,
    engine: str = "local",
    address: str | None = None,
    workspace: str = ".",
) -> dict[str, Any]:
    """Score images, and tell whether they are still like those the model was validated on.

    Args:
        sources: files, folders, URLs, and names of known data sets; paths are taken from the
            workspace.
        model: a bundle's folder, or an address in the registry such as models:/NAME@champion.
        out: the Parquet file to write; report and figure are beside it, .drift.json and .drift.png.
        resize: `crop`, `fit` or `exact`; by default images of other sizes are refused, unless the
            model's own were resized.
        skip_bad: go on without files that cannot be used.
        engine: what computes: `local`, the cores here, or `ray`.
        address: of a Ray cluster; by default one of this machine's own.
        workspace: the folder with dvc.yaml, or one inside it.

    Returns:
        The report (see `vaeflow.scoring.drift`).
    """
    place = Workspace.find(workspace)
    thresholds = load_parameters(place.parameters).drift
    batch = Batch(
        tuple(sources),
        model,
        Path(out),
        latents=True,
        asked=Asked(resize),
        skip_bad=skip_bad,
        engine=engine,
        address=address,
    )
    with chdir(place.root):
        scored = result_of(score_images(batch, return_state=True))
        report = result_of(compare(scored, thresholds, return_state=True))
    lines = [*scored.lines(), *summary(report)]
    print("\n".join(lines))
    create_markdown_artifact(_as_markdown(lines, report), key="score", description="Scored batch")
    return report


def _as_markdown(lines: list[str], report: dict[str, Any]) -> str:
    """Write what came of it, and a table of the numbers that differ most."""
    most = sorted(report["marginals"], key=lambda entry: -entry["distance"])[:10]
    rows = [
        f"| {entry['name']} | {entry['distance']:.3f} | {entry['adjusted_p_value']:.3g} "
        f"| {'yes' if entry['drifted'] else 'no'} |"
        for entry in most
    ]
    facts = [f"- {line.strip()}" for line in lines]
    head = ["", "| | distance | adjusted p | drifted |", "|---|---|---|---|"]
    return "\n".join([*facts, *head, *rows])
