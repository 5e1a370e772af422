"""Real workspaces for the tests: DVC, MLflow and Prefect as they are, in temporary folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# A copy of MNIST's files, where there is one: tests that use it are skipped elsewhere.
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"
SCRATCH = Path(tempfile.mkdtemp(prefix="vaeflow-tests-"))

# Nothing of the user's own is read or written: no tracking server, cache or Prefect profile.
for variable in [name for name in os.environ if name.startswith(("MLFLOW_", "PREFECT_", "DVC_"))]:
    del os.environ[variable]
os.environ |= {
    "DO_NOT_TRACK": "1",
    "PREFECT_HOME": str(SCRATCH / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "VAEFLOW_CACHE": str(SCRATCH / "cache"),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GIT_AUTHOR_NAME": "tests",
    "GIT_AUTHOR_EMAIL": "tests@localhost",
    "GIT_COMMITTER_NAME": "tests",
    "GIT_COMMITTER_EMAIL": "tests@localhost",
}


def run(folder: Path, *command: str, status: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a command in a folder and check its exit status."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_workspace(folder: Path, **train: object) -> Path:
    """A clone of this project's pipeline, with its sample data and other training parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", "params.yaml", "data.dvc", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / "pipelines", folder / "pipelines")
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(REPOSITORY / ".dvc" / name, folder / ".dvc" / name)
    shutil.copytree(REPOSITORY / ".dvc" / "sample-remote", folder / ".dvc" / "sample-remote")
    change_parameters(folder, train=train)
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "workspace")
    run(folder, "dvc", "pull", "data.dvc")
    return folder


def change_parameters(folder: Path, **sections: dict) -> None:
    """Edit `params.yaml`, keeping its layout."""
    from ruamel.yaml import YAML

    yaml = YAML()
    path = folder / "params.yaml"
    parameters = yaml.load(path)
    for section, values in sections.items():
        parameters[section].update(values)
    yaml.dump(parameters, path)


def aliases(root: Path) -> dict[str, str]:
    """Alias to version of the sample model; some stores answer with numbers."""
    from vaeflow.training.tracking import connect
    from vaeflow.workspace import Workspace

    registered = connect(Workspace(root)).get_registered_model("digits-vae")
    return {alias: str(version) for alias, version in registered.aliases.items()}
