"""What comes of a sweep: a table of its trials, figures, and a preset of the best one."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from vaeflow.common.files import atomic_file
from vaeflow.common.workspace import Workspace
from vaeflow.config.auto import plain

if TYPE_CHECKING:
    from optuna import Study

TABLE = "trials.csv"
FIGURES = ("importance.png", "parallel.png")
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


def write(workspace: Workspace, study: Study, name: str, folder: Path) -> FrozenTrial | None:
    """Write the table, the figures, and the preset of the best trial, which is returned."""
    trials = study.get_trials(deepcopy=False)
    _write_table(folder / TABLE, trials)
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        return None
    _draw(study, folder)
    _write_preset(workspace.presets / f"{name}.yaml", study)
    return study.best_trial


def ended(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return those of the trials that are over."""
    return [trial for trial in trials if trial.state.is_finished()]


def listed(values: Mapping[str, Any]) -> str:
    """Return parameters in a line."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """Return a value in as many digits as one reads."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def files(folder: Path) -> list[Path]:
    """List what `write` has written into the folder."""
    return [path for name in (TABLE, *FIGURES) if (path := folder / name).exists()]


def _write_table(path: Path, trials: Sequence[FrozenTrial]) -> None:
    """Write a row a trial, with the reason why it ended early."""
    again = {trial.user_attrs.get("again"): trial.number for trial in trials}
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    head = ("trial", "state", "validation_elbo", "epochs", "seconds", "reason")
    with atomic_file(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*head, *keys))
        for trial in trials:
            if trial.state == TrialState.WAITING:
                continue
            reason = trial.user_attrs.get("reason", "")
            if trial.number in again:
                reason = f"{reason or 'killed'}; made again as trial {again[trial.number]}"
            reached = list(trial.intermediate_values.values())
            value = trial.values[0] if trial.values else reached[-1] if reached else ""
            seconds = trial.duration.total_seconds() if trial.duration else None
            writer.writerow(
                (
                    trial.number,
                    STATES[trial.state],
                    value,
                    trial.user_attrs.get("epochs", ""),
                    "" if seconds is None else round(seconds),
                    reason,
                    *(trial.params.get(key, "") for key in keys),
                )
            )


def _write_preset(path: Path, study: Study) -> None:
    """Write the parameters of the best trial, with what `auto` stood for in it."""
    from ruamel.yaml import YAML

    best = study.best_trial
    values = best.user_attrs["values"].items()
    searched = {key.removeprefix("train."): value for key, value in values}
    yaml = YAML()
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        file.write(
            f"# The best of {len(ended(study.trials))} trials of the sweep {study.study_name}, "
            f"{time.strftime('%Y-%m-%d')}: trial {best.number}, a\n"
            f"# validation ELBO of {best.values[0]:.3f} nats. With what auto stood for in it.\n"
        )
        yaml.dump({"train": {**best.user_attrs["chosen"], **searched}}, file)


def _draw(study: Study, folder: Path) -> None:
    """Draw which parameters matter, and what each trial had; neither if there are too few."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as figures

    drawn: tuple[Any, ...] = (figures.plot_param_importances, figures.plot_parallel_coordinate)
    for name, draw in zip(FIGURES, drawn, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of few trials it says little, and knows it
                axes = draw(study, target_name="validation ELBO, nats")
        except (RuntimeError, ValueError):  # one trial, or all with the same value
            continue
        with atomic_file(folder / name) as fresh:
            axes.figure.savefig(fresh, dpi=120, bbox_inches="tight", format="png")
        pyplot.close(axes.figure)
