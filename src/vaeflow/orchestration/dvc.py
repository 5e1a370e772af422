"""DVC's graph, and running one stage of it.

`dvc.yaml` is the only place where the stages are written; here they are read.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any

from vaeflow.common import code
from vaeflow.common.processes import process_group
from vaeflow.common.progress import BAR
from vaeflow.common.versioning import (
    dvc_command,
    dvc_environment,
    is_import,
    require_data,
    run_dvc,
)
from vaeflow.common.workspace import Workspace
from vaeflow.errors import BusyError, DataError, StageError, hide_secrets

UNVERSIONED = (
    "data/ differs from data.dvc. Version the new images (dvc add data) "
    "or go back to the versioned ones (dvc checkout data.dvc)."
)


def stages(workspace: Workspace) -> list[str]:
    """List the stages of `dvc.yaml`, each after those it depends on.

    Raises:
        StageError: DVC cannot read the graph.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from networkx import dfs_postorder_nodes

    try:
        with Repo(str(workspace.root)) as repo:
            # An edge leads to what a stage needs, which this order has first. A tracked file
            # (data.dvc) is a node, too, but there is nothing to run for it.
            order = dfs_postorder_nodes(repo.index.graph)
            return [_address(stage) for stage in order if not stage.is_data_source]
    except DvcException as error:
        raise StageError(
            f"DVC cannot read the stages of {workspace.root}: {error}. `dvc dag` says where."
        ) from None


def _address(stage: Any) -> str:
    """Name a stage as `dvc repro` takes it: with its file, unless that is the workspace's own."""
    file = stage.path_in_repo
    return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"


@contextmanager
def lock_workspace(
    workspace: Workspace, wait: bool, report: Callable[[str], None]
) -> Iterator[None]:
    """Keep other flows out of the workspace during the block.

    Args:
        workspace: which.
        wait: for one that does, to its end.
        report: called with a line when there is something to wait for.

    Raises:
        BusyError: another flow is at work, and waiting was not asked for.
    """
    from filelock import FileLock, Timeout

    path = workspace.root / ".dvc" / "tmp" / "vaeflow-flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise BusyError(f"another flow is at work in {workspace.root}.") from None
        report(f"waiting for another flow to leave {workspace.root}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fetch(workspace: Workspace, wait: bool, say: Callable[[str], None]) -> None:
    """Bring data and outputs from the DVC remote, as far as it has them.

    Args:
        workspace: whose.
        wait: for a flow that is at work there.
        say: called with a line when there is something to wait for, and when something came.

    Raises:
        BusyError: a flow is at work, and waiting was not asked for.
        StageError: DVC cannot fetch them.
    """
    code.link(workspace)
    with lock_workspace(workspace, wait, say):
        # What changed, then the sum: "2 files fetched and 2 files added".
        *_, came = run_dvc(workspace, "pull", "--allow-missing").strip().splitlines() or [""]
    if came and "up to date" not in came:
        say(f"{'pull':<10} {came}")


def fetch_data(workspace: Workspace, force: bool = False) -> list[str]:
    """Bring `data/` to what `data.dvc` says; where that is an import, to its source's newest.

    Images that no version stands for stop the run: `dvc repro -s` would train on them without a
    word, and `dvc repro` would rewrite `data.dvc`, and nobody decided that they are the next.

    Args:
        workspace: whose.
        force: take all stages for out of date.

    Returns:
        The stages to run, in order: all from the first that is out of date by what is there now,
        as those before it depend on nothing that changed.

    Raises:
        DataError: `data/` is missing, or holds images without a version.
        StageError: DVC cannot fetch them.
    """
    code.link(workspace)
    if is_import(workspace):
        run_dvc(workspace, "update", "data.dvc")
    with ThreadPoolExecutor(1) as beside:
        graph = beside.submit(stages, workspace)
        status = _status(workspace)
    if "data.dvc" in status:
        try:
            run_dvc(workspace, "pull", "data.dvc")
        except StageError as error:
            if "unsaved files" in str(error):
                raise DataError(UNVERSIONED) from None
            raise
        status = _status(workspace)
    require_data(workspace)
    if not workspace.data_pointer.is_file():
        raise DataError(UNVERSIONED)
    return list(dropwhile(lambda stage: not force and stage not in status, graph.result()))


def _status(workspace: Workspace) -> dict[str, Any]:
    return json.loads(run_dvc(workspace, "status", "--json"))


def run_stage(
    workspace: Workspace, stage: str, report: Callable[[str], None], force: bool = False
) -> None:
    """Run `dvc repro -s STAGE`, which does nothing when its outputs are up to date.

    The stage's processes are ended when the caller is interrupted: a signal to dvc alone would
    leave the training running.

    Args:
        workspace: where.
        stage: a name from `stages`.
        report: called with each line that the stage prints, as it comes. A bar is a line, too: it
            ends with a carriage return.
        force: run it even if its outputs are up to date.

    Raises:
        StageError: the stage failed; the message holds the end of its output.
    """
    lines: list[str] = []
    # Quietly: what DVC would say, `git add dvc.lock` after every stage, is for those who type it.
    command = dvc_command("repro", "--quiet", "--single-item", *(["--force"] if force else []))
    with process_group(
        [*command, stage],
        cwd=workspace.root,
        env=dvc_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = hide_secrets(line.rstrip())
            report(line)
            if not line.startswith(BAR):
                lines.append(line)
        status = process.wait()
    if status:
        output = "\n".join(lines[-8:])
        raise StageError(f"stage {stage} failed (dvc exited with {status}):\n{output}")


def make_prepared(workspace: Workspace, say: Callable[[str], None]) -> None:
    """Bring `outputs/prepared` up to date, and what it depends on.

    Args:
        workspace: whose.
        say: called with a line when there is something to wait for.

    Raises:
        DataError, StageError: as `fetch_data` and `run_stage`.
    """
    with lock_workspace(workspace, wait=True, report=say):
        for stage in fetch_data(workspace):
            if stage == "train":
                break
            run_stage(workspace, stage, say)
