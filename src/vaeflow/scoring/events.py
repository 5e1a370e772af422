"""Telling Prefect of drift."""

from __future__ import annotations

import re
from pathlib import Path

DRIFT_DETECTED = "vaeflow.drift.detected"
WATCHED = re.compile(r"^[^#\n]*resource\.id\S*\s*[\"']?vaeflow\.model\.([^\s\"'}]+)", re.MULTILINE)


def emit_drift(report: dict) -> bool:
    """Send the event `vaeflow.drift.detected` to the Prefect server in `PREFECT_API_URL`.

    Its resource is `vaeflow.model.NAME`, the model that scored the batch. Its payload are the
    report's `model_version`, `bundle_sha256`, `data_md5`, `table` and `images`; the names of what
    `drifted`; and `discrepancy_p_value`. An automation or a deployment's trigger answers to it:

        triggers:
          - expect: ["vaeflow.drift.detected"]
            match: {prefect.resource.id: "vaeflow.model.digits-vae"}

    Args:
        report: from `vaeflow.scoring.drift.measure_drift`.

    Returns:
        Whether it was given to Prefect, which has sent it by then, or says in the log that the
        server does not answer. Where none is named there is nobody to tell, and that
        is no error.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return False
    from prefect.events import emit_event
    from prefect.events.worker import EventsWorker

    name = report["model_name"]
    resource = {"prefect.resource.id": f"vaeflow.model.{name}", "prefect.resource.name": name}
    kept = ("model_version", "bundle_sha256", "data_md5", "table", "images")
    payload = {key: report[key] for key in kept}
    payload["drifted"] = [entry["name"] for entry in report["marginals"] if entry["drifted"]]
    payload["discrepancy_p_value"] = report["discrepancy"]["p_value"]
    emit_event(event=DRIFT_DETECTED, resource=resource, payload=payload)
    EventsWorker.instance().wait_until_empty()
    return True


def other_models_triggers(deployments: Path, name: str) -> str | None:
    """What is wrong with the triggers of `prefect.yaml`, where drift of a model starts none.

    Args:
        deployments: `prefect.yaml`; it may be missing.
        name: of the model.
    """
    if not deployments.is_file():
        return None
    watched = set(WATCHED.findall(deployments.read_text(encoding="utf-8")))
    if not watched or name in watched or "*" in watched:
        return None
    return (
        f"{deployments.name} retrains on drift of {', '.join(sorted(watched))}, and this model is "
        f"{name}: write vaeflow.model.{name} there, and deploy again"
    )
