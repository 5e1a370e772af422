"""Telling Prefect of drift."""

from __future__ import annotations

DRIFT_DETECTED = "vaeflow.drift.detected"


def emit_drift(report: dict) -> bool:
    """Send the event `vaeflow.drift.detected` to the Prefect server in `PREFECT_API_URL`.

    Its resource is `vaeflow.model.NAME`, the model that scored the batch. Its payload are the
    report's `model_version`, `bundle_sha256`, `data_md5`, `table` and `images`; the names of what
    `drifted`; and `discrepancy_p_value`. An automation or a deployment's trigger answers to it:

        triggers:
          - expect: ["vaeflow.drift.detected"]
            match: {prefect.resource.id: "vaeflow.model.*"}

    Args:
        report: from `vaeflow.scoring.drift.measure_drift`.

    Returns:
        Whether it was given to Prefect, which sends it before the process ends, and says so in the
        log where the server does not answer. Where none is named there is nobody to tell, and that
        is no error.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return False
    from prefect.events import emit_event

    name = report["model_name"]
    resource = {"prefect.resource.id": f"vaeflow.model.{name}", "prefect.resource.name": name}
    kept = ("model_version", "bundle_sha256", "data_md5", "table", "images")
    payload = {key: report[key] for key in kept}
    payload["drifted"] = [entry["name"] for entry in report["marginals"] if entry["drifted"]]
    payload["discrepancy_p_value"] = report["discrepancy"]["p_value"]
    emit_event(event=DRIFT_DETECTED, resource=resource, payload=payload)
    return True
