"""What a sweep searches: a file of parameters, each with choices or with a range."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaeflow.config.auto import DataFacts, plain, resolve
from vaeflow.config.schema import Parameters, Train, validate
from vaeflow.errors import ConfigError
from vaeflow.model.likelihoods import name_measure

if TYPE_CHECKING:
    from optuna import Trial

# Bounds are compared: of these keys only choices under which they are of the same thing.
MEASURED = ("likelihood", "levels", "binarize")
NOT_SEARCHED = {
    "auto": "it chooses other parameters",
    "seed": "the luckiest seed is not a better parameter",
}
EXAMPLE = "train.latent_dim: {low: 8, high: 64, log: true}, or train.prior: [standard, flow]"


@dataclass(frozen=True)
class Choices:
    """Some values; each is known to Optuna by its text, as it may be a list."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, key: str) -> Any:
        """Choose one for a trial."""
        texts = {plain(value): value for value in self.values}
        return texts[trial.suggest_categorical(key, list(texts))]

    def some(self) -> tuple[Any, ...]:
        """Return values that must all be allowed if the range is."""
        return self.values


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`: whole ones if both ends are.

    Attributes:
        low, high: both are included.
        log: whether to search by ratios, not by differences.
        step: between two neighbours; None for all numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Trial, key: str) -> float:
        """Choose one for a trial."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = int(self.step or 1)
            return trial.suggest_int(key, self.low, self.high, step=step, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    def some(self) -> tuple[float, ...]:
        """Return values that must all be allowed if the range is."""
        return (self.low, self.high)


Space = Mapping[str, Choices | Range]


def read_space(path: Path, parameters: Parameters, facts: DataFacts) -> Space:
    """Read a file with a key of `train` a line, and its choices or its range.

    Args:
        path: YAML.
        parameters: of the workspace; keys that the file does not name stay as they are there.
        facts: what the images are.

    Raises:
        ConfigError: the file cannot be used; all faults are named in one message.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: expected a line a parameter, as {EXAMPLE}.")
    faults: list[str] = []
    space = {}
    for key, given in content.items():
        try:
            space[str(key)] = _searched(str(key), given, parameters.train)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {fault}" for fault in faults))
    _compare_like(path, space, parameters.train, facts)
    return space


def suggest(space: Space, trial: Trial) -> dict[str, Any]:
    """Choose a value of each key for a trial: `{"section.key": value}`."""
    return {key: searched.suggest(trial, key) for key, searched in space.items()}


def described(space: Space) -> dict[str, Any]:
    """Return a space as what JSON can hold."""
    return {
        key: [type(one).__name__, *map(plain, vars(one).values())] for key, one in space.items()
    }


def _searched(key: str, given: Any, settings: Train) -> Choices | Range:
    """Read one line."""
    section, _, name = key.partition(".")
    if section != "train":
        raise ConfigError(f"{key}: only keys of train can be searched, as train.latent_dim.")
    if name in NOT_SEARCHED:
        raise ConfigError(f"{key}: cannot be searched: {NOT_SEARCHED[name]}.")
    if name not in Train.model_fields:  # the schema knows the nearest one
        _check(key, {"train": {name: None}})
    if isinstance(given, list) and given:
        searched: Choices | Range = Choices(tuple(given))
    elif isinstance(given, dict):
        searched = _range(key, given)
    else:
        raise ConfigError(f"{key}: expected [choices] or {{low: ..., high: ...}}, found {given!r}.")
    for value in searched.some():
        # Beside the defaults: what does not go with the other keys is for the trial to say.
        _check(key, {"train": {name: value}})
    return searched


def _range(key: str, given: Mapping[str, Any]) -> Range:
    known = {"low", "high", "log", "step"}
    if missing := {"low", "high"} - given.keys():
        raise ConfigError(f"{key}: {' and '.join(sorted(missing, reverse=True))} missing.")
    if strange := given.keys() - known:
        raise ConfigError(f"{key}: {', '.join(map(str, strange))}: expected low, high, log, step.")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{key}: log must be true or false, found {log!r}.")
    low, high = (_number(key, name, given[name]) for name in ("low", "high"))
    step = _number(key, "step", given["step"]) if "step" in given else None
    whole = isinstance(low, int) and isinstance(high, int)
    if not low < high:
        raise ConfigError(f"{key}: low must be below high, found {low} and {high}.")
    if log and (low <= 0 or step is not None):
        raise ConfigError(f"{key}: with log, low must be above 0, and there is no step.")
    if step is not None and (step <= 0 or (whole and not isinstance(step, int))):
        raise ConfigError(f"{key}: step must be above 0, and whole where low and high are.")
    return Range(low, high, log, step)


def _number(key: str, name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}: {name} must be a number, found {value!r}.")
    return value


def _check(key: str, content: dict[str, Any]) -> None:
    """Refuse what the schema does, in one line.

    Raises:
        ConfigError: it does.
    """
    try:
        validate(content, key)
    except ConfigError as error:
        raise ConfigError(faults_of(error)) from None


def faults_of(error: ConfigError) -> str:
    """Return what the schema found wrong, without the line that says where."""
    return str(error).partition("\n")[2].strip()


def _compare_like(path: Path, space: Space, settings: Train, facts: DataFacts) -> None:
    """Refuse choices under which the bounds would be of different things."""
    keys = [f"train.{key}" for key in MEASURED if f"train.{key}" in space]
    found: dict[str, str] = {}
    for values in itertools.product(*(space[key].some() for key in keys)):
        changes = {
            key.removeprefix("train."): value for key, value in zip(keys, values, strict=True)
        }
        try:
            chosen, _ = resolve(settings.with_values(changes), facts)
        except ConfigError:
            continue  # two that do not go together: such a trial says so
        measure = name_measure(facts.image_shape, chosen.likelihood, chosen.levels, chosen.binarize)
        found.setdefault(measure, ", ".join(f"{key} {value}" for key, value in changes.items()))
    if len(found) > 1:
        one, other, *_ = found
        raise ConfigError(
            f"{path}: trials could not be compared: with {found[one]} a bound is of {one}, with "
            f"{found[other]} of {other}. Search each by itself."
        )
