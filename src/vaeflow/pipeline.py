"""DVC's graph, and running one stage of it.

`dvc.yaml` is the only place where the stages are written; here they are read.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter

from vaeflow.config import load_parameters
from vaeflow.errors import BusyError, DataError, StageError
from vaeflow.processes import process_group
from vaeflow.versioning import (
    data_is_versioned,
    data_md5,
    dvc,
    dvc_command,
    dvc_environment,
    is_import,
    require_data,
)
from vaeflow.workspace import Workspace

EDGE = re.compile(r'^"(?P<before>[^"]+)" -> "(?P<after>[^"]+)";$')
NODE = re.compile(r'^"(?P<name>[^"]+)";$')


def stages(workspace: Workspace) -> list[str]:
    """The stages of `dvc.yaml`, each after those it depends on.

    Raises:
        StageError: DVC cannot read the graph.
    """
    graph: dict[str, set[str]] = {}
    for line in dvc(workspace, "dag", "--dot").splitlines():
        if edge := EDGE.match(line.strip()):
            graph.setdefault(edge["after"], set()).add(edge["before"])
        elif node := NODE.match(line.strip()):
            graph.setdefault(node["name"], set())
    # A tracked file (data.dvc) is a node of DVC's graph, but there is nothing to run for it.
    return [name for name in TopologicalSorter(graph).static_order() if not name.endswith(".dvc")]


@contextmanager
def alone_in(workspace: Workspace, wait: bool, report: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other flow works in the workspace.

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


def check_parameters(workspace: Workspace) -> None:
    """Refuse a `params.yaml` with a key or a value that is not allowed (ConfigError)."""
    load_parameters(workspace.parameters)


def check_inputs(workspace: Workspace) -> None:
    """Refuse wrong parameters, and images that no version stands for.

    `dvc repro -s` would run on changed data without a word, and `dvc repro` would rewrite
    `data.dvc`: either way nobody decided that these images are the next version.

    Raises:
        ConfigError: `params.yaml` has a key or a value that is not allowed.
        DataError: `data/` is missing or differs from `data.dvc`.
    """
    check_parameters(workspace)
    require_data(workspace)
    if not data_is_versioned(workspace):
        raise DataError(
            "data/ differs from data.dvc. Version the new images (dvc add data) "
            "or go back to the versioned ones (dvc checkout data.dvc)."
        )


def fetch_data(workspace: Workspace) -> str:
    """Bring `data/` to what `data.dvc` says; where that is an import, to its source's newest.

    Images that are in `data/` without a version are left alone: `check_inputs` names them.

    Returns:
        What was done, in words.

    Raises:
        StageError: DVC cannot fetch them.
    """
    if is_import(workspace):
        before = data_md5(workspace)
        dvc(workspace, "update", "data.dvc")
        changed = data_md5(workspace) != before
        return f"imported data: {'a new version' if changed else 'no newer version'}"
    if data_is_versioned(workspace):
        return "data/ is what data.dvc says"
    try:
        dvc(workspace, "pull", "data.dvc")
    except StageError as error:
        if "unsaved files" in str(error):  # in data/, which DVC would have to replace
            return "data/ holds images without a version"
        raise
    return "data/ pulled"


def changed_stages(workspace: Workspace) -> list[str]:
    """The stages that are out of date by what is there now; those after them will be, too."""
    status = json.loads(dvc(workspace, "status", "--json"))
    return [name for name in status if not name.endswith(".dvc")]


def run_stage(
    workspace: Workspace, stage: str, report: Callable[[str], None], force: bool = False
) -> None:
    """Run `dvc repro -s STAGE`, which does nothing when its outputs are up to date.

    The stage's processes are ended when the caller is interrupted: a signal to dvc alone would
    leave the training running.

    Args:
        workspace: where.
        stage: a name from `stages`.
        report: called with each line of output as it comes.
        force: run it even if its outputs are up to date.

    Raises:
        StageError: the stage failed; the message holds the end of its output.
    """
    lines: list[str] = []
    with process_group(
        dvc_command("repro", "--single-item", *(["--force"] if force else []), stage),
        cwd=workspace.root,
        env=dvc_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            report(line.rstrip())
        status = process.wait()
    if status:
        output = "\n".join(lines[-8:])
        raise StageError(f"stage {stage} failed (dvc exited with {status}):\n{output}")
