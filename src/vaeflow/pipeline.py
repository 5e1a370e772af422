"""DVC's graph, and running one stage of it.

`dvc.yaml` is the only place where the stages are written; here they are read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

from vaeflow.config import load_parameters
from vaeflow.errors import DataError, StageError
from vaeflow.processes import process_group
from vaeflow.workspace import Workspace

EDGE = re.compile(r'^"(?P<before>[^"]+)" -> "(?P<after>[^"]+)";$')
NODE = re.compile(r'^"(?P<name>[^"]+)";$')


def stages(workspace: Workspace) -> list[str]:
    """The stages of `dvc.yaml`, each after those it depends on.

    Raises:
        StageError: DVC cannot read the graph.
    """
    graph: dict[str, set[str]] = {}
    for line in _dvc_output(workspace, "dag", "--dot").splitlines():
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
    if not workspace.data.exists():
        raise DataError("data/ is missing. Fetch the versioned images: dvc pull")
    changed = _dvc_output(workspace, "status", "data.dvc")
    if "up to date" not in changed:
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
        [*_dvc(), "repro", "--single-item", stage],
        cwd=workspace.root,
        env=_environment(),
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


def _dvc_output(workspace: Workspace, *arguments: str) -> str:
    done = subprocess.run(
        [*_dvc(), *arguments],
        cwd=workspace.root,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        command = " ".join(("dvc", *arguments))
        raise StageError(f"`{command}` failed in {workspace.root}:\n{done.stderr.strip()}")
    return done.stdout


def _dvc() -> list[str]:
    return [sys.executable, "-m", "dvc"]


def _environment() -> dict[str, str]:
    # Stages call `vaeflow` by name: it must be this environment's.
    here = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([here, os.environ.get("PATH", "")])}
