"""Where things are in a workspace: the folder that holds `dvc.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaeflow.errors import WorkspaceError

TRIALS = Path(".dvc") / "tmp" / "tune"


@dataclass(frozen=True)
class Workspace:
    """The paths the stages share. `root` is absolute."""

    root: Path

    @classmethod
    def find(cls, start: Path | str = ".") -> Workspace:
        """Find the workspace that holds `start`: the nearest folder upwards with a `dvc.yaml`.

        Raises:
            WorkspaceError: there is none.
        """
        start = Path(start).resolve()
        for folder in (start, *start.parents):
            if (folder / "dvc.yaml").is_file():
                return cls(folder)
        raise WorkspaceError(
            f"{start}: neither this folder nor one above it holds a dvc.yaml. "
            "Run the command inside a project, or make one: vaeflow init NAME"
        )

    @property
    def repository(self) -> Path:
        """The root of the user's checkout, which keeps the runs and the registry.

        It is `root`, but for `dvc exp run --temp`, whose stages run in a copy under `.dvc/tmp` that
        DVC deletes afterwards.
        """
        inside = [folder.parent for folder in self.root.parents if folder.name == ".dvc"]
        return inside[0] if inside else self.root

    @property
    def trials(self) -> Path:
        """Where the trials of sweeps are made, each in a workspace of its own."""
        return self.root / TRIALS

    @property
    def code(self) -> Path:
        """The folder whose git commit says which code is run.

        It is `root`, but for the trial of a sweep, which git does not know.
        """
        inside = TRIALS.as_posix() in self.root.as_posix()
        return self.repository if inside else self.root

    @property
    def parameters(self) -> Path:
        """The parameter file."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The images, tracked by `data.dvc`."""
        return self.root / "data"

    @property
    def data_pointer(self) -> Path:
        """The file by which git knows which images."""
        return self.root / "data.dvc"

    @property
    def prepared(self) -> Path:
        """Output of `prepare`: one `.npy` a split, `index.parquet` and `dataset.json`."""
        return self.root / "outputs" / "prepared"

    @property
    def model(self) -> Path:
        """Output of `train`: `model.keras`, `history.csv` and `run.json`."""
        return self.root / "outputs" / "model"

    @property
    def stopped(self) -> Path:
        """What `train` leaves when it has to stop: the last good weights. No stage's output."""
        return self.root / "outputs" / "stopped" / "model.keras"

    @property
    def checkpoints(self) -> Path:
        """What `train` can go on from: a folder a training. No stage's output."""
        return self.root / "outputs" / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Output of `evaluate`: `metrics.json`, tables, score quantiles and figures."""
        return self.root / "outputs" / "evaluation"

    @property
    def bundle(self) -> Path:
        """Output of `export`: what is registered and served."""
        return self.root / "outputs" / "bundle"

    @property
    def report(self) -> Path:
        """Output of `report`: a page on the model, `index.html`."""
        return self.root / "outputs" / "report"

    @property
    def flow(self) -> Path:
        """The file with the retraining flow."""
        return self.root / "pipelines" / "retrain.py"

    @property
    def logs(self) -> Path:
        """What runs say in detail: a file a run of `vaeflow retrain`. No stage's output."""
        return self.root / "outputs" / "logs"

    @property
    def tuning(self) -> Path:
        """What sweeps found: a folder each. No stage's output."""
        return self.root / "outputs" / "tuning"

    @property
    def presets(self) -> Path:
        """Files of parameters to be taken over into `params.yaml`."""
        return self.root / "presets"

    def require(self, path: Path, remedy: str) -> Path:
        """Return the folder of a file that must exist, or name it and the remedy.

        Raises:
            WorkspaceError: the file is missing.
        """
        if not path.is_file():
            raise WorkspaceError(f"{path.relative_to(self.root)} is missing. {remedy}")
        return path.parent
