"""The retraining flow: every stage of dvc.yaml as a task, then the registry."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed
from prefect.tasks import exponential_backoff

from vaeflow.common.versioning import run_dvc
from vaeflow.common.workspace import Workspace
from vaeflow.config.edit import check, override_parameters
from vaeflow.config.schema import load_parameters
from vaeflow.errors import BusyError, RegistryError, StageError
from vaeflow.orchestration import console, dvc, report
from vaeflow.orchestration.prefect import result_of, without_traceback
from vaeflow.registry import champion, gate
from vaeflow.registry.probe import Probe
from vaeflow.registry.register import find_registered, preload, register
from vaeflow.registry.versions import Version
from vaeflow.scoring.drift import unmatched_trigger_warning
from vaeflow.tracking.runs import store_address

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import TaskRun


async def is_worth_retrying(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether it was a remote or a server that failed."""
    return isinstance(await state.aresult(raise_on_failure=False), (RegistryError, StageError))


def say(text: str) -> None:
    """Log a line that also whoever watches the run should see."""
    console.say(text, get_run_logger().info)


# DVC and the registry know what was done before; a result is never taken from an earlier run.
step: Any = functools.partial(task, cache_policy=NO_CACHE)
# For what speaks with remotes and servers. A training that failed would fail again.
patient: Any = functools.partial(
    step,
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
)


@patient(task_run_name="fetch-data")
@without_traceback
def fetch_data(workspace: Workspace, force: bool) -> list[str]:
    """Bring data/ to its newest version; return the stages to run."""
    return dvc.fetch_data(workspace, force)


@step(task_run_name="{stage}")
@without_traceback
def run_stage(workspace: Workspace, stage: str, force: bool) -> None:
    """Bring one DVC stage up to date."""
    log = get_run_logger().info
    with console.stage(stage, log) as shown:
        dvc.run_stage(
            workspace,
            stage,
            report=lambda line: log(line) if shown.heard(line) else None,
            force=force,
        )


@patient(task_run_name="register")
@without_traceback
def register_bundle(workspace: Workspace) -> Version:
    """Register the bundle, unless it is a version already."""
    return register(workspace)


@patient(task_run_name="gate")
@without_traceback
def judge(workspace: Workspace, version: Version, probe: Probe) -> gate.Verdict | None:
    """Compare the version with the champion, and look whether it is fit to serve."""
    return champion.judge_once(workspace, version, probe)


@patient(task_run_name="promote")
@without_traceback
def promote(
    workspace: Workspace, version: Version, verdict: gate.Verdict | None
) -> champion.Outcome:
    """Make the version champion or challenger, by the verdict."""
    return champion.apply_verdict(workspace, version, verdict)


@patient(task_run_name="push")
@without_traceback
def push_outputs(workspace: Workspace) -> None:
    """Send data and outputs to the DVC remote."""
    say(f"push       {run_dvc(workspace, 'push').strip()}")


@patient(task_run_name="publish")
@without_traceback
def publish(workspace: Workspace, outcome: champion.Outcome) -> None:
    """Leave a summary, the figures and a picture beside the run, and the page beside the model."""
    found = report.describe(workspace, outcome.version)
    shown = report.publish_page(workspace, str(outcome), found)
    create_markdown_artifact(report.summary(str(outcome), found), key="retrain-summary")
    create_table_artifact(report.metrics_table(workspace), key="retrain-metrics")
    if picture := report.picture(workspace):
        create_image_artifact(picture, key="retrain-reconstructions")
    if page := report.mlflow_page(found):
        create_link_artifact(page, link_text=outcome.uri, key="retrain-mlflow")
    if shown:
        create_link_artifact(shown, link_text=f"page on {outcome.uri}", key="retrain-report")


@flow(name="retrain", log_prints=True)
@without_traceback
def retrain(
    workspace: str = ".",
    name: str | None = None,
    overrides: dict[str, Any] | None = None,
    force: bool = False,
    push: bool = False,
    busy: Literal["wait", "cancel"] = "wait",
) -> str | State:
    """Bring the pipeline up to date, register its bundle, and promote it if it is better.

    Args:
        workspace: the folder with dvc.yaml, or one inside it.
        name: of the registered model, instead of `export.name`.
        overrides: parameters for this run alone, as `{"train.epochs": 5}`.
        force: run every stage even if nothing changed.
        push: send data and outputs to the DVC remote at the end.
        busy: what to do where another flow is at work in the workspace.

    Returns:
        The registered version's address, `models:/NAME/VERSION`; or the flow's state, where that
        has a sentence of its own.
    """
    place = Workspace.find(workspace)
    overrides = {**(overrides or {}), **({"export.name": name} if name else {})}
    try:
        check(place, overrides)
        with dvc.lock_workspace(place, busy == "wait", say), override_parameters(place, overrides):
            return bring_up_to_date(place, force, push)
    except BusyError as error:
        return Cancelled(message=str(error), data=error)


def bring_up_to_date(place: Workspace, force: bool, push: bool) -> str | State:
    """Run everything, in a workspace that is its own. What stops a task stops the flow."""
    model = load_parameters(place.parameters).export.name
    if wrong := unmatched_trigger_warning(place.root / "prefect.yaml", model):
        say(f"warning: {wrong}")
    stages = result_of(fetch_data(place, force, return_state=True))
    if not stages and (known := find_outcome(place)):
        message = f"nothing changed: {known}"
        say(message)
        return Completed(message=message, data=known.uri)

    with ThreadPoolExecutor(1) as beside, Probe(store_address(place)) as probe:
        # This process only waits for the stages: what comes after them gets ready meanwhile.
        beside.submit(preload, place)
        for stage in stages:
            if stage == stages[-1]:
                probe.start()
            result_of(run_stage(place, stage, force, return_state=True))
        version = result_of(register_bundle(place, return_state=True))
        verdict = result_of(judge(place, version, probe, return_state=True))
    outcome = result_of(promote(place, version, verdict, return_state=True))
    result_of(publish(place, outcome, return_state=True))
    if push:
        result_of(push_outputs(place, return_state=True))
    say(f"see        {report.where_to_look(place)}")
    say(str(outcome))
    return outcome.uri


def find_outcome(place: Workspace) -> champion.Outcome | None:
    """Return what became of the bundle that is there, if the gate's verdict was carried out."""
    version = find_registered(place)
    return champion.earlier_outcome(place, version) if version else None
