"""The retraining flow: every stage of dvc.yaml as a task, then the registry."""

from __future__ import annotations

from prefect import flow, get_run_logger, task

from vaeflow import pipeline
from vaeflow.registry.register import Registered, register
from vaeflow.workspace import Workspace


@task(task_run_name="{stage}")
def run_stage(workspace: Workspace, stage: str) -> None:
    """Bring one DVC stage up to date."""
    pipeline.run_stage(workspace, stage, report=get_run_logger().info)


@task(task_run_name="register")
def register_bundle(workspace: Workspace) -> Registered:
    """Register the bundle, and make it champion if it is better."""
    return register(workspace)


@flow(name="retrain", log_prints=True)
def retrain(workspace: str = ".") -> str:
    """Bring the pipeline up to date and register its bundle.

    Args:
        workspace: the folder with dvc.yaml, or one inside it.

    Returns:
        The registered version's address, `models:/NAME/VERSION`.
    """
    place = Workspace.find(workspace)
    pipeline.check_data(place)
    for stage in pipeline.stages(place):
        run_stage(place, stage)
    registered = register_bundle(place)
    print(f"{registered.uri} is @{registered.alias}: {registered.reason}")
    return registered.uri
