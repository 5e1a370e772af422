"""What a retraining run tells the people who look at it later."""

from __future__ import annotations

import base64
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vaeflow.common.workspace import Workspace
from vaeflow.registry.versions import SCHEME
from vaeflow.report.page import PAGE, with_verdict
from vaeflow.tracking.runs import connect, find_run, registry_errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from vaeflow.registry.versions import Version


# A picture is kept inside of the artifact, as the page that shows it may be on another machine.
LARGEST_PICTURE = 500_000


def describe(workspace: Workspace, version: Version) -> ModelVersion:
    """Return the registered version, with its tags."""
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        return client.get_model_version(version.name, version.number)


def summary(outcome: str, found: ModelVersion) -> str:
    """Write Markdown: what became of the run, the gate's verdict, and where the model came from."""
    tags = found.tags
    checks = [f"| {name} | {said} |" for name, said in _checks(found).items()]
    made_of = [
        f"| {key} | `{tags.get(key, 'unknown')}` |"
        for key in ("data_md5", "git_commit", "parameters_sha256", "bundle_sha256")
    ]
    return "\n".join(
        [
            f"# {SCHEME}{found.name}/{found.version}",
            "",
            outcome,
            "",
            "| check | verdict |",
            "|---|---|",
            *checks,
            "",
            "| made of | |",
            "|---|---|",
            *made_of,
        ]
    )


def _checks(found: ModelVersion) -> dict[str, str]:
    """Return what the gate looked at, and what it found."""
    tags = {name: found.tags.get(f"gate.{name}") for name in ("quality", "servability", "sanity")}
    return {name: said for name, said in tags.items() if said is not None}


def publish_page(workspace: Workspace, outcome: str, found: ModelVersion) -> str | None:
    """Put the page on the model, with the gate's verdict, beside its run in MLflow.

    The stage's own page is an output of DVC's, which stays what the stage has made.

    Returns:
        Its address in MLflow's pages; None where no server shows any.
    """
    page = workspace.report / PAGE
    run = find_run(workspace, str(found.run_id)) if page.is_file() else None
    if run is None:
        return None
    text = with_verdict(page.read_text(encoding="utf-8"), outcome, _checks(found))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PAGE
        copy.write_text(text, encoding="utf-8")
        run.log_file(copy, "report")
    pages = _mlflow_pages()
    if pages is None:
        return None
    with registry_errors(run.client.tracking_uri):
        experiment = run.client.get_run(run.run_id).info.experiment_id
    return f"{pages}/experiments/{experiment}/runs/{run.run_id}/artifacts/report/{PAGE}"


def metrics_table(workspace: Workspace) -> list[dict[str, str]]:
    """Return the figures on the test images, a row each."""
    metrics: Mapping[str, float] = json.loads((workspace.evaluation / "metrics.json").read_text())
    return [{"metric": name, "value": f"{value:.6g}"} for name, value in metrics.items()]


def picture(workspace: Workspace) -> str | None:
    """Return test images and reconstructions as an address that holds the picture itself."""
    content = (workspace.evaluation / "reconstructions.png").read_bytes()
    if len(content) > LARGEST_PICTURE:
        return None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def where_to_look(place: Workspace) -> str:
    """Say where the page on the model, versions and runs are, for whoever has just made some."""
    page = (place.report / PAGE).relative_to(place.root)
    runs = "" if tracking_server() else " | mlflow ui --backend-store-uri sqlite:///mlflow.db"
    return f"{page} | vaeflow models{runs}"


def tracking_server() -> str:
    """Return the address that `MLFLOW_TRACKING_URI` names, or nothing."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def mlflow_page(found: ModelVersion) -> str | None:
    """Return the address of the version's page in MLflow, where a server shows one."""
    pages = _mlflow_pages()
    return f"{pages}/models/{found.name}/versions/{found.version}" if pages else None


def _mlflow_pages() -> str | None:
    server = tracking_server()
    if not server.startswith("http"):
        return None
    # The link is kept by Prefect: whoever may follow it has a password of their own.
    server = re.sub(r"(?<=://)[^/]*@", "", server)
    return f"{server.rstrip('/')}/#"
