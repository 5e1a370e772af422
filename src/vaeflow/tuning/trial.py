"""One trial of a sweep: `vaeflow train` in a workspace of its own, with its own parameters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vaeflow.common.files import atomic_file, locked, sha256_of
from vaeflow.common.processes import end_left_behind, process_group, process_name, python_command
from vaeflow.common.progress import BAR
from vaeflow.common.workspace import Workspace
from vaeflow.config.edit import changed_text
from vaeflow.config.schema import load_parameters
from vaeflow.errors import TrainingError, hide_secrets
from vaeflow.tracking.runs import TAGS_VARIABLE
from vaeflow.training.history import HISTORY, Reached, kept_row, read_epoch_line, read_history

GRACE = 60  # seconds in which a training that is told to end closes its run


class StoppedError(TrainingError):
    """The training was told to end."""

    def __init__(self) -> None:
        super().__init__("stopped")


class Trained(NamedTuple):
    """What a training came to.

    Attributes:
        validation_elbo: of the weights that are kept, in nats per image.
        epochs: how many were made.
        chosen: what `auto` stood for.
    """

    validation_elbo: float
    epochs: int
    chosen: Mapping[str, Any]


class TrialRun:
    """The workspace of a trial, and the training in it.

    The folder's name is a digest of the parameters: when the same are tried again, after a kill,
    the training goes on from its checkpoint.

    Args:
        workspace: whose images and parameters.
        sweep: its name.
        values: what this trial changes, `{"section.key": value}`.

    Attributes:
        stopped: whether the training was told to end.
    """

    def __init__(self, workspace: Workspace, sweep: str, values: Mapping[str, Any]):
        self.source = workspace
        self.values = values
        self.workspace = Workspace(workspace.trials / sweep / digest(values)[:16])
        self.stopped = False
        self._process: subprocess.Popen[str] | None = None

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep others out of the folder while the block runs; yields whether none is in it now."""
        self.workspace.root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.workspace.root, wait=False))
                alone = True
            except (BlockingIOError, FileNotFoundError):  # gone: another one ended just now
                alone = False
            yield alone

    def train(
        self,
        name: str,
        tags: Mapping[str, str],
        log: Path,
        reached: Callable[[Reached], None],
    ) -> Trained:
        """Train to the end, unless `reached` raises, or `stop` is called; where one is `alone`.

        Args:
            name: of the MLflow run.
            tags: of the MLflow run.
            log: where all that it prints is added.
            reached: called after each epoch.

        Raises:
            StoppedError: it was told to end.
            TrainingError: it failed.
        """
        self._make_folder()
        log.parent.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        with (
            log.open("a", encoding="utf-8") as kept,
            process_group(
                python_command("vaeflow", "train"),
                grace=GRACE,
                cwd=self.workspace.root,
                env={**os.environ, "DVC_EXP_NAME": name, TAGS_VARIABLE: json.dumps(dict(tags))},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as self._process,
        ):
            self._note_process(self._process.pid)
            if self.stopped:
                self.stop()
            assert self._process.stdout is not None
            for line in self._process.stdout:
                line = hide_secrets(line.rstrip())
                if line.startswith(BAR):
                    continue
                print(line, file=kept, flush=True)
                lines.append(line)
                if (found := read_epoch_line(line)) and not self.stopped:
                    reached(found)
            status = self._process.wait()
        if self.stopped:
            raise StoppedError
        if status:
            raise TrainingError(f"vaeflow train ended with {status}: {' '.join(lines[-3:])}")
        return self._outcome()

    def stop(self) -> None:
        """Tell the training to end: it writes a checkpoint and closes its run."""
        self.stopped = True
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def run_id(self) -> str | None:
        """Return the id of its MLflow run, finished or not; None where it has none."""
        with suppress(OSError):
            return str(json.loads((self.workspace.model / "run.json").read_text())["run_id"])
        for file in self.workspace.checkpoints.glob("*/run"):
            return file.read_text()
        return None

    def remove(self) -> None:
        """Remove the folder: what it came to is recorded elsewhere."""
        shutil.rmtree(self.workspace.root, ignore_errors=True)

    def _make_folder(self) -> None:
        """Make the workspace, or take over the one of the same trial that was killed."""
        root, source = self.workspace.root, self.source
        with suppress(FileNotFoundError):
            end_left_behind(self._owner.read_text(), GRACE)
        for path in (source.root / "dvc.yaml", source.data_pointer):
            if path.is_file():
                shutil.copy(path, root)
        with atomic_file(self.workspace.parameters) as fresh:
            fresh.write_text(changed_text(source, self.values), encoding="utf-8")
        self.workspace.prepared.parent.mkdir(exist_ok=True)
        links = {self.workspace.prepared: source.prepared, root / "src": source.root / "src"}
        for link, target in links.items():
            if target.exists() and not link.is_symlink():
                link.symlink_to(target)

    @property
    def _owner(self) -> Path:
        """The file with the name of the process that trains here."""
        return self.workspace.root / "process"

    def _note_process(self, pid: int) -> None:
        with atomic_file(self._owner) as fresh:
            fresh.write_text(process_name(pid))

    def _outcome(self) -> Trained:
        about = json.loads((self.workspace.model / "run.json").read_text())
        settings = load_parameters(self.workspace.parameters).train.with_values(about["chosen"])
        rows = read_history(self.workspace.model / HISTORY)
        return Trained(kept_row(rows, settings)["validation_elbo"], len(rows), about["chosen"])


def digest(value: object) -> str:
    """Return what the same values always have, and others never."""
    return sha256_of(json.dumps(value, sort_keys=True).encode())
