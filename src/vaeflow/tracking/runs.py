"""Experiment tracking: the one place that knows how runs are kept in MLflow."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from vaeflow.common.processes import is_gone, this_process
from vaeflow.common.workspace import Workspace
from vaeflow.errors import RegistryError, WorkspaceError

if TYPE_CHECKING:
    from mlflow import MlflowClient


EXPERIMENT = "vaeflow"
# Which process a run is open in, as `this_process` says it.
PROCESS_TAG = "vaeflow.process"
# The variable with more tags of a training's run, as JSON: of which sweep it is a trial.
TAGS_VARIABLE = "VAEFLOW_RUN_TAGS"
SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"
ESCAPED = re.compile("%[0-9a-fA-F]{2}")
# Where a local store's tables hold addresses of artifacts.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def store_address(workspace: Workspace | None = None) -> str:
    """Return where runs and models are kept.

    `MLFLOW_TRACKING_URI` wins; without it, the SQLite file `mlflow.db` at the workspace's root.

    Args:
        workspace: found from the working directory when not given.

    Raises:
        RegistryError: neither names a tracking store.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    try:
        return _address(_database(workspace or Workspace.find()))
    except WorkspaceError as error:
        raise RegistryError(f"{error} Or name a registry in MLFLOW_TRACKING_URI.") from None


def _database(workspace: Workspace) -> Path:
    return workspace.repository / "mlflow.db"


def _address(database: Path) -> str:
    # What follows a `?` would not be the path's any more; SQLite itself knows how to escape it.
    if "?" in str(database):
        return f"{SQLITE}file:{quote(str(database))}?uri=true"
    return f"{SQLITE}{database}"


def connect(workspace: Workspace | None = None) -> MlflowClient:
    """Connect to the tracking server and registry at `store_address`.

    Raises:
        RegistryError: there is no such address, or nothing that could be used there.
    """
    # Read when MLflow is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow would try a server that is gone for minutes, and a training would wait for it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = store_address(workspace)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        with registry_errors(uri):
            return MlflowClient(uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI"))
    workspace = workspace or Workspace.find()
    if ESCAPED.search(str(workspace.repository)):
        raise RegistryError(
            f"{workspace.repository}: MLflow would read the % with two digits in this folder's "
            "name as another character. Give the folder another name."
        )
    if not (database := _database(workspace)).exists():
        _create(database)
    try:
        adopt_database(database)
        return MlflowClient(tracking_uri=uri)
    except (MlflowException, sqlite3.DatabaseError) as error:
        raise RegistryError(
            f"{database} cannot be used with MLflow {version('mlflow')}: {error} If an older "
            "MLflow made it, copy it and then bring it up to date: "
            "mlflow db upgrade sqlite:///mlflow.db. If a newer one did, install that one."
        ) from None


def adopt_database(database: Path) -> None:
    """Adopt a database that was moved or copied with its workspace: let it name the files here.

    MLflow notes absolute addresses: a copy would write into the workspace it was copied from.

    Args:
        database: of a workspace; what it has of `mlartifacts` anywhere else, it then has of the
            folder beside it, unless that other one was never a workspace's.
    """
    here = _artifacts(database)
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        locations = "SELECT DISTINCT artifact_location FROM experiments"
        if not any(_is_elsewhere(place, here) for (place,) in connection.execute(locations)):
            return
        connection.isolation_level = None
        connection.execute("BEGIN IMMEDIATE")
        for (place,) in connection.execute(locations).fetchall():
            if not _is_elsewhere(place, here):
                continue
            for table, column in ADDRESSES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (here, len(place) + 1, place, len(place) + 1, f"{place}/"),
                )
        connection.execute("COMMIT")


def is_local(address: str) -> bool:
    """Return whether artifacts are on this machine."""
    return address.startswith("file:")


def local_folder(address: str) -> Path:
    """Return the folder that a local address of artifacts stands for."""
    return Path(unquote(urlsplit(address).path))


def _artifacts(database: Path) -> str:
    return (database.parent / ARTIFACTS).as_uri()


def _is_elsewhere(place: str | None, here: str) -> bool:
    """Return whether a place for artifacts is another workspace's, or was."""
    if not place or place == here or not is_local(place):
        return False
    folder = local_folder(place)
    if folder.name != ARTIFACTS:
        return False
    return not folder.exists() or (folder.parent / "mlflow.db").exists()


def _create(database: Path) -> None:
    """Create the tables, once.

    Two processes that first use one new database together break it, and so does a kill meanwhile:
    one at a time, under another name, renamed when done.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    with FileLock(database.with_suffix(".lock")):
        if database.exists():
            return
        fresh = database.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        MlflowClient(tracking_uri=_address(fresh)).search_experiments()
        with closing(sqlite3.connect(fresh)) as connection, connection:
            # MLflow's own first experiment would keep its files in the working directory.
            connection.execute(
                "UPDATE experiments SET artifact_location = ?", [_artifacts(database)]
            )
        fresh.rename(database)


@contextmanager
def registry_errors(store: str) -> Iterator[None]:
    """Turn what the tracking store or registry answers with into one clear error.

    Raises:
        RegistryError: it cannot be reached, or refuses.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise RegistryError(
            f"tracking store {store}: {error} Is MLFLOW_TRACKING_URI right, and the server running?"
        ) from None


def _experiment_id(client: MlflowClient, workspace: Workspace) -> str:
    """Return the id of `MLFLOW_EXPERIMENT_NAME` (default: vaeflow), made on first use."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    # Where a database file keeps artifacts is fixed for good when the experiment is made, and
    # would default to the working directory. A server decides for itself.
    local = client.tracking_uri.startswith("sqlite:")
    location = _artifacts(_database(workspace)) if local else None
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another process was first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


class Run:
    """One open MLflow run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record values at a step, in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with registry_errors(self.client.tracking_uri):
            self.client.log_batch(self.run_id, metrics=points)

    def parameters(self) -> dict[str, str]:
        """Return the parameters that have been recorded."""
        with registry_errors(self.client.tracking_uri):
            return self.client.get_run(self.run_id).data.params

    def steps_of(self, metric: str) -> set[int]:
        """Return at which steps a metric has been recorded."""
        with registry_errors(self.client.tracking_uri):
            return {point.step for point in self.client.get_metric_history(self.run_id, metric)}

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Upload a file among the run's artifacts."""
        with registry_errors(self.client.tracking_uri):
            self._upload(path, folder)

    def log_folder(self, path: Path, folder: str) -> str:
        """Upload what a folder holds among the run's artifacts, and return its address there."""
        with registry_errors(self.client.tracking_uri):
            return f"{self._upload(path, folder)}/{folder}"

    def _upload(self, path: Path, folder: str | None) -> str:
        # The client's own upload remembers, for the whole process, where the artifacts of a run
        # were first; in a copy of a workspace the same run keeps its artifacts elsewhere.
        from mlflow.store.artifact import artifact_repository_registry as repositories

        address = str(self.client.get_run(self.run_id).info.artifact_uri)
        store: Any = repositories.get_artifact_repository(
            address, tracking_uri=self.client.tracking_uri
        )
        send = store.log_artifacts if path.is_dir() else store.log_artifact
        send(str(path), folder)
        return address

    def log_evaluation(self, folder: Path) -> None:
        """Record the metrics and the figures that `evaluate` wrote."""
        metrics = json.loads((folder / "metrics.json").read_text())
        self.log_metrics({f"test_{name}": value for name, value in metrics.items()})
        for figure in sorted(folder.glob("*.png")):
            self.log_file(figure, "figures")

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add tags."""
        from mlflow.entities import RunTag

        with registry_errors(self.client.tracking_uri):
            added = [RunTag(name, text) for name, text in tags.items()]
            self.client.log_batch(self.run_id, tags=added)

    def is_finished(self) -> bool:
        """Return whether it was closed as FINISHED."""
        with registry_errors(self.client.tracking_uri):
            return self.client.get_run(self.run_id).info.status == "FINISHED"

    def finish(self) -> None:
        """Close it as FINISHED."""
        with registry_errors(self.client.tracking_uri):
            self.client.set_terminated(self.run_id, "FINISHED")


def champion_parameters(workspace: Workspace, name: str) -> dict[str, str] | None:
    """Return what the run of a model's champion recorded, by key; None without a champion.

    Args:
        workspace: whose registry.
        name: of the registered model.

    Raises:
        RegistryError: the registry cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        try:
            run_id = client.get_model_version_by_alias(name, "champion").run_id
            return dict(client.get_run(run_id).data.params) if run_id else None
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None


def run_tags() -> dict[str, str]:
    """Return the tags that whoever started this process wants its run to have."""
    return json.loads(os.environ.get(TAGS_VARIABLE, "{}"))


@contextmanager
def start_run(
    workspace: Workspace,
    name: str | None,
    parameters: Mapping[str, object],
    tags: Mapping[str, str],
    again: str | None = None,
) -> Iterator[Run]:
    """Open a run, closed as FINISHED, FAILED (an exception) or KILLED (interrupted).

    Args:
        workspace: whose store.
        name: of the run.
        parameters, tags: recorded with it.
        again: id of a run that is opened again instead, where this store still has it and its
            parameters are the same.
    """
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    texts = {key: str(value) for key, value in parameters.items()}
    tags = {**tags, PROCESS_TAG: this_process()}
    run = find_run(workspace, again) if again else None
    if run is None or run.parameters() != texts:
        run = _create_run(workspace, name)
    client = run.client
    _close_left_behind(workspace, client, run.run_id)
    status = "KILLED"
    try:
        with registry_errors(client.tracking_uri):
            client.update_run(run.run_id, status="RUNNING")
            client.log_batch(
                run.run_id,
                params=[Param(key, text) for key, text in texts.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
        yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        try:
            client.set_terminated(run.run_id, status)
        except MlflowException as error:  # must not hide what ended the run
            print(f"run {run.run_id} could not be closed as {status}: {error.message}")


def _close_left_behind(workspace: Workspace, client: MlflowClient, present: str) -> None:
    """Close, as KILLED, the open runs of processes that were killed before they could do it."""
    with registry_errors(client.tracking_uri):
        experiment = _experiment_id(client, workspace)
        for run in all_pages(client.search_runs, [experiment], "attributes.status = 'RUNNING'"):
            process = run.data.tags.get(PROCESS_TAG)
            if process and run.info.run_id != present and is_gone(process):
                client.set_terminated(run.info.run_id, "KILLED")


def _create_run(workspace: Workspace, name: str | None) -> Run:
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        created = client.create_run(_experiment_id(client, workspace), run_name=name)
    return Run(client, created.info.run_id)


def all_pages(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return all that one of MLflow's searches finds, not only its first page."""
    found, token = [], None
    while True:
        page = search(*arguments, page_token=token)
        found += page
        if not (token := page.token):
            return found


def find_run(workspace: Workspace | None, run_id: str) -> Run | None:
    """Find the run of that id; None where this tracking store does not have it.

    A model that comes from DVC's cache may have been trained against another store.
    """
    from mlflow.exceptions import MlflowException

    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    # A run deleted in MLflow's page is still there, but takes nothing more.
    return Run(client, run_id) if run.info.lifecycle_stage == "active" else None
