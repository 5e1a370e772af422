"""The retraining flow: every stage of dvc.yaml as a task, then the registry."""

from __future__ import annotations

import functools

from prefect import flow, get_run_logger, task
from prefect.states import Failed, State

from vaeflow import pipeline
from vaeflow.errors import VaeflowError
from vaeflow.registry.register import Registered, register
from vaeflow.workspace import Workspace


def without_traceback(function):
    """End a run that a user's mistake stopped as failed, with that message; bugs are raised."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except VaeflowError as error:
            return Failed(message=str(error), data=error)

    return guarded


@task(task_run_name="{stage}")
@without_traceback
def run_stage(workspace: Workspace, stage: str) -> None:
    """Bring one DVC stage up to date."""
    pipeline.run_stage(workspace, stage, report=get_run_logger().info)


@task(task_run_name="register")
@without_traceback
def register_bundle(workspace: Workspace) -> Registered:
    """Register the bundle, and make it champion if it is better."""
    return register(workspace)


@flow(name="retrain", log_prints=True)
@without_traceback
def retrain(workspace: str = ".") -> str | State:
    """Bring the pipeline up to date and register its bundle.

    Args:
        workspace: the folder with dvc.yaml, or one inside it.

    Returns:
        The registered version's address, `models:/NAME/VERSION`; or the state of the task that
        failed, which becomes the flow's.
    """
    place = Workspace.find(workspace)
    pipeline.check_inputs(place)
    for stage in pipeline.stages(place):
        state = run_stage(place, stage, return_state=True)
        if not state.is_completed():
            return state
    state = register_bundle(place, return_state=True)
    if not state.is_completed():
        return state
    registered = state.result()
    print(registered)
    return registered.uri
