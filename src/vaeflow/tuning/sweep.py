"""A sweep: Optuna chooses parameters, each trial is a training, and what comes of it is kept."""

from __future__ import annotations

import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna import TrialPruned
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from vaeflow.common import code
from vaeflow.common.files import sha256_of
from vaeflow.common.processes import cores, is_gone, shares, this_process
from vaeflow.common.workspace import Workspace
from vaeflow.config.auto import read_facts
from vaeflow.config.edit import check
from vaeflow.config.schema import Parameters
from vaeflow.errors import ConfigError, DataError, TrainingError, VaeflowError
from vaeflow.tracking.lineage import collect_lineage
from vaeflow.tracking.runs import Run, find_run, start_run
from vaeflow.training.history import Reached
from vaeflow.tuning import results
from vaeflow.tuning.space import Space, described, faults_of, read_space, suggest
from vaeflow.tuning.trial import StoppedError, Trained, TrialRun, digest

if TYPE_CHECKING:
    from optuna import Study, Trial

Say = Callable[[str], None]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
GIB_A_TRAINING = 1.5
# TPE learns from trials that are over: more at once would be a random search.
TRIALS_A_WORKER = 4
# Seconds between two signs of life, and without one until a trial is made again elsewhere.
HEARTBEAT, SILENCE = 30, 150
TRIES = 3  # of a trial whose process is killed again and again
FAILURES = 3  # at the beginning, without one that trains: then something else is wrong
# No trial is pruned before this share of its epochs, in percent, nor beside fewer others.
PRUNED_FROM, PRUNED_BESIDE = 25, 4


def tune(
    workspace: Workspace,
    parameters: Parameters,
    file: Path,
    name: str,
    trials: int,
    workers: int | None,
    storage: str | None,
    say: Say,
) -> FrozenTrial | None:
    """Try parameters until a sweep has so many trials, and write what came of them.

    A sweep of that name goes on; trials of a process that was killed are made again, from their
    checkpoints. `outputs/tuning/NAME` gets a table of all trials, figures, and their logs;
    `presets/NAME.yaml` gets the parameters of the best one. Nothing is registered or promoted.

    Args:
        workspace: whose images, on `outputs/prepared`.
        parameters: what is not searched.
        file: the space, see `read_space`.
        name: of the sweep.
        trials: in all, with those made before and on other machines.
        workers: trials at once; None: as many as cores, memory and `trials` allow.
        storage: address of a database that several machines share; None: a file of the workspace.
        say: called with a line as something happens.

    Returns:
        The best trial; None if none was trained to the end.

    Raises:
        ConfigError: the space, the name or the storage cannot be used.
        DataError: the images were changed meanwhile.
        TrainingError: all that were tried first failed.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: use letters, digits, - _ and dots.")
    prepared = workspace.require(workspace.prepared / "dataset.json", "Make it: dvc repro prepare")
    space = read_space(file, parameters, read_facts(prepared))
    folder = workspace.tuning / name
    with _optuna_is_quiet():
        study = _study(folder, name, storage, parameters.train.seed)
        _check_same(study, _made_with(workspace, parameters, space))
        sweep = _Sweep(workspace, name, space, study, trials, say)
        sweep.take_up_left_behind()
        begun = study.user_attrs.get("run")
        about = {key: " ".join(map(str, text)) for key, text in described(space).items()}
        with start_run(
            workspace, f"sweep {name}", about, collect_lineage(workspace, parameters), again=begun
        ) as run:
            study.set_user_attr("run", run.run_id)
            sweep.parent = run.run_id
            try:
                sweep.run(workers or _workers(trials))
            finally:
                best = results.write(workspace, study, name, folder)
            if best:
                _report(run, study, folder)
    return best


def _workers(trials: int) -> int:
    """Return how many trainings this machine has room for at once."""
    import psutil

    if Path("/proc/driver/nvidia/gpus").is_dir():
        return 1
    room = int(psutil.virtual_memory().available / (GIB_A_TRAINING * 2**30))
    return max(1, min(cores(), room, trials // TRIALS_A_WORKER))


@contextmanager
def _optuna_is_quiet() -> Iterator[None]:
    """Have failures told by the sweep alone, and no warnings that an interface may change."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _study(folder: Path, name: str, storage: str | None, seed: int) -> Study:
    """Open the sweep's study, made on first use."""
    if storage is None:
        folder.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{folder / 'study.db'}"
    else:
        address = storage
    try:
        kept = _storage(address)
        study = optuna.create_study(
            study_name=name, storage=kept, direction="maximize", load_if_exists=True
        )
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.OptunaError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--storage {address} cannot be used: {reason} Expected a database's address, as "
            "postgresql://USER@HOST/NAME."
        ) from None
    # Not the same numbers again when it goes on, nor beside another machine.
    own = digest([seed, len(study.trials), os.uname().nodename])
    study.sampler = optuna.samplers.TPESampler(seed=int(own[:7], 16), multivariate=True)
    study.pruner = optuna.pruners.MedianPruner(PRUNED_BESIDE, PRUNED_FROM)
    return study


def _storage(address: str, attempts: int = 5) -> optuna.storages.RDBStorage:
    """Connect to a database, with its tables made on first use.

    Raises:
        SQLAlchemyError, ImportError, ValueError: it cannot be used.
    """
    try:
        return optuna.storages.RDBStorage(
            address,
            engine_kwargs={"connect_args": {"timeout": 60}} if "sqlite" in address else None,
            heartbeat_interval=HEARTBEAT,
            grace_period=SILENCE,
            heartbeat_stale_trial_callback=_again,
        )
    except DatabaseError:
        # Of machines that begin at once all make the tables, and all but one are refused.
        if attempts == 1:
            raise
        time.sleep(0.5)
        return _storage(address, attempts - 1)


def _made_with(workspace: Workspace, parameters: Parameters, space: Space) -> dict[str, str]:
    """Say what a sweep's trials have in common: a digest each."""
    searched = {key.removeprefix("train.") for key in space}
    fixed = parameters.train.model_dump(mode="json", exclude=searched)
    return {
        "search space": digest(described(space)),
        "parameters": digest(fixed),
        "images": _images(workspace),
        "code": code.digest(code.TRAIN),
    }


def _images(workspace: Workspace) -> str:
    return sha256_of((workspace.prepared / "index.parquet").read_bytes())


def _check_same(study: Study, made_with: Mapping[str, str]) -> None:
    """Refuse to go on with a sweep of something else.

    Raises:
        ConfigError: its trials could not be compared with those to come.
    """
    before = study.user_attrs.get("made_with")
    if before is None:
        study.set_user_attr("made_with", dict(made_with))
    elif other := [name for name, value in made_with.items() if before.get(name) != value]:
        raise ConfigError(
            f"the sweep {study.study_name} was made with other {' and '.join(other)}: its trials "
            "could not be compared with these. Give this one another --name."
        )


def _again(study: Study, trial: FrozenTrial) -> None:
    """Let the trial of a process that is gone be made again, unless it always ends so."""
    tries = trial.user_attrs.get("tries", 1)
    if tries < TRIES:
        about = {"again": trial.number, "tries": tries + 1}
        study.enqueue_trial(trial.params, user_attrs=about)


@dataclass
class _Sweep:
    """A sweep at work.

    Attributes:
        parent: id of the MLflow run that the trials' runs belong to.
        active: the trainings that are going on here.
        starting: how many have been taken that the database does not know yet.
    """

    workspace: Workspace
    name: str
    space: Space
    study: Study
    trials: int
    say: Say
    parent: str = ""
    active: set[TrialRun] = field(default_factory=set)
    starting: int = 0
    stopping: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    first: int = 0

    def take_up_left_behind(self) -> None:
        """Let trials be made again that a process of this machine began which is gone."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get("process")
            if process and is_gone(process):
                self.study.tell(trial.number, state=TrialState.FAIL)
                _again(self.study, trial)
                self.say(f"trial {trial.number} was killed; it goes on from its last checkpoint")
        self.first = len(self.study.trials)

    def run(self, workers: int) -> None:
        """Make the trials that are missing, several at once, each with its share of the cores."""
        self.say(
            f"sweep {self.name}: {self._used()} of {self.trials} trials made, {workers} at once"
        )
        with ThreadPoolExecutor(workers) as pool:
            each = [pool.submit(self._work, share) for share in shares(workers)]
            try:
                for one in as_completed(each):
                    one.result()
            except BaseException:
                self.stopping = True
                for training in tuple(self.active):
                    training.stop()
                raise

    def _work(self, share: Sequence[int] | None) -> None:
        """Make one trial after the other."""
        if share:
            os.sched_setaffinity(0, share)  # of this thread, and of the processes that it starts
        while self._take():
            self.study.optimize(self._try, n_trials=1, catch=(VaeflowError,))

    def _take(self) -> bool:
        """Return whether there is another trial to make."""
        optuna.storages.fail_stale_trials(self.study)
        if _images(self.workspace) != self.study.user_attrs["made_with"]["images"]:
            raise DataError(
                f"the images in {self.workspace.prepared} were changed while the sweep was at "
                "work. Its trials are kept; a sweep of the new images needs another --name."
            )
        with self.lock:
            if self.stopping or self._used() + self.starting >= self.trials:
                return False
            here = self.study.get_trials(deepcopy=False)[self.first :]
            failed = [trial for trial in here if trial.state == TrialState.FAIL]
            if len(failed) >= FAILURES and len(failed) == len(results.ended(here)):
                raise TrainingError(
                    f"the first {len(failed)} trials failed; the last one: "
                    f"{failed[-1].user_attrs.get('reason')} Logs: {self._logs}"
                )
            self.starting += 1
        return True

    def _used(self) -> int:
        """Return how many trials there are, without those that are made again."""
        trials = self.study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("again") for trial in trials}
        return sum(
            trial.state != TrialState.WAITING and trial.number not in again for trial in trials
        )

    @property
    def _logs(self) -> Path:
        return self.workspace.tuning / self.name / "logs"

    def _try(self, trial: Trial) -> float:
        """Make one trial, and return its validation ELBO."""
        trial.set_user_attr("process", this_process())
        with self.lock:
            self.starting -= 1
        values = suggest(self.space, trial)
        trial.set_user_attr("values", values)
        try:
            value, said = self._value(trial, values)
        except (VaeflowError, TrialPruned) as error:
            if isinstance(error, StoppedError):
                _again(self.study, self.study.get_trials(deepcopy=False)[trial.number])
            trial.set_user_attr("reason", str(error))
            self.say(f"trial {trial.number}, {results.listed(values)}: {error}")
            raise
        self.say(f"trial {trial.number}, {results.listed(values)}: {said}")
        return value

    def _value(self, trial: Trial, values: Mapping[str, Any]) -> tuple[float, str]:
        """Return what a trial comes to, and say so."""
        if (same := self._same(trial)) is not None:
            if same.state != TrialState.COMPLETE:
                raise TrialPruned(f"the same parameters as trial {same.number}")
            trial.set_user_attr("same_as", same.number)
            trial.set_user_attr("chosen", same.user_attrs["chosen"])
            return same.values[0], f"{same.values[0]:.3f} nats, as trial {same.number}"
        try:
            check(self.workspace, values)
        except ConfigError as error:
            raise ConfigError(faults_of(error)) from None
        training = TrialRun(self.workspace, self.name, values)
        with training.alone() as alone:
            if not alone:
                raise TrialPruned("the same parameters as a trial that is at work")
            trained = self._train(trial, training)
        trial.set_user_attr("chosen", dict(trained.chosen))
        trial.set_user_attr("epochs", trained.epochs)
        elbo = trained.validation_elbo
        return elbo, f"{elbo:.3f} nats, {trained.epochs} epochs"

    def _train(self, trial: Trial, training: TrialRun) -> Trained:
        """Train, and record in the trial's MLflow run what became of it."""
        self.active.add(training)
        training.stopped = self.stopping
        state, reason = "failed", ""
        try:
            trained = training.train(
                f"{self.name} {trial.number}",
                {"mlflow.parentRunId": self.parent, "sweep": self.name, "trial": str(trial.number)},
                self._logs / f"trial-{trial.number:04}.log",
                lambda reached: judge(trial, reached),
            )
            state = "complete"
        except TrialPruned as pruned:
            state, reason = "pruned", str(pruned)
            raise
        except TrainingError as error:
            state = "stopped" if isinstance(error, StoppedError) else "failed"
            reason = str(error)
            raise
        finally:
            self.active.discard(training)
            if state != "stopped":
                self._tell(training, {"trial_state": state, "trial_reason": reason})
                if state != "failed":  # its last good weights may be there
                    training.remove()
        return trained

    def _same(self, trial: Trial) -> FrozenTrial | None:
        """Return a trial with the same parameters that was there before, and need not be again."""
        again = trial.user_attrs.get("again")
        for other in self.study.get_trials(deepcopy=False)[: trial.number]:
            known = other.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
            if known and other.number != again and other.params == trial.params:
                return other
        return None

    def _tell(self, training: TrialRun, tags: Mapping[str, str]) -> None:
        """Record in a trial's MLflow run what became of it."""
        run_id = training.run_id()
        run = find_run(self.workspace, run_id) if run_id else None
        if run:
            run.tag({name: text for name, text in tags.items() if text})


def judge(trial: Trial, reached: Reached) -> None:
    """Report an epoch, and end a trial that is worse than half of the others were then.

    Raises:
        TrialPruned: it is.
    """
    # Trials of other lengths are compared at the same share of their epochs.
    before, share = (round(100 * n / reached.epochs) for n in (reached.epoch - 1, reached.epoch))
    if share == before and reached.epoch > 1:
        return  # more than a hundred epochs: one of that share was reported
    trial.report(reached.validation_elbo, share)
    if reached.epoch < reached.epochs and trial.should_prune():
        raise TrialPruned(
            f"pruned after epoch {reached.epoch} of {reached.epochs}: "
            f"{reached.validation_elbo:.3f} nats, below the median of the other trials"
        )


def _report(run: Run, study: Study, folder: Path) -> None:
    """Record a sweep's outcome in its MLflow run."""
    over = results.ended(study.get_trials(deepcopy=False))
    run.log_metrics({"best_validation_elbo": study.best_value, "trials": len(over)})
    for path in results.files(folder):
        run.log_file(path)
