"""DVC's graph, and running one stage of it.

`dvc.yaml` is the only place where the stages are written; here they are read.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from graphlib import TopologicalSorter

from vaeflow.config import load_parameters
from vaeflow.errors import DataError, StageError
from vaeflow.processes import process_group
from vaeflow.versioning import data_is_versioned, dvc, dvc_command, dvc_environment, require_data
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


def check_inputs(workspace: Workspace) -> None:
    """Refuse wrong parameters, and images that no version stands for.

    `dvc repro -s` would run on changed data without a word, and `dvc repro` would rewrite
    `data.dvc`: either way nobody decided that these images are the next version.

    Raises:
        ConfigError: `params.yaml` has a key or a value that is not allowed.
        DataError: `data/` is missing or differs from `data.dvc`.
    """
    load_parameters(workspace.parameters)
    require_data(workspace)
    if not data_is_versioned(workspace):
        raise DataError(
            "data/ differs from data.dvc. Version the new images (dvc add data) "
            "or go back to the versioned ones (dvc checkout data.dvc)."
        )


def run_stage(workspace: Workspace, stage: str, report: Callable[[str], None]) -> None:
    """Run `dvc repro -s STAGE`, which does nothing when its outputs are up to date.

    The stage's processes are ended when the caller is interrupted: a signal to dvc alone would
    leave the training running.

    Args:
        workspace: where.
        stage: a name from `stages`.
        report: called with each line of output as it comes.

    Raises:
        StageError: the stage failed; the message holds the end of its output.
    """
    lines: list[str] = []
    with process_group(
        dvc_command("repro", "--single-item", stage),
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
