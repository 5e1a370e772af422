"""`params.yaml` as frozen, validated models.

One section per DVC stage, of the same name, then those of what comes after the stages. An unknown
key is refused with the nearest valid one; a wrong type is refused with the key and what would be
right. Nothing is converted silently.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vaeflow.config.model import Binarize, Likelihood, Objective, Prior, VAEConfig, check_network
from vaeflow.errors import ConfigError

AUTO: Any = "auto"


class OrAuto:
    """Allow `auto` in the place of a value, as `Annotated[type, OrAuto()]`.

    The type is what the value is once `vaeflow.config.auto.resolve` has chosen one.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def choose(value: Any, validate: Any) -> Any:
            return value if value == AUTO else validate(value)

        plain = core_schema.plain_serializer_function_ser_schema(
            lambda value: list(value) if isinstance(value, tuple) else value
        )
        inner = handler(source)
        return core_schema.no_info_wrap_validator_function(choose, inner, serialization=plain)


Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Filters = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1, max_length=8)]
Levels = Annotated[int, Field(ge=2, le=256)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Limits(_Section):
    """What the header of an image file or array may declare; more is refused, not decoded."""

    # What to do where an image has more, for errors.
    raised_by: ClassVar[str] = "--max-pixels"

    # Height x width: a few kilobytes of PNG can decode to gigabytes.
    max_pixels: Annotated[int, Field(ge=1, le=2**32)] = 2**26
    # Unpacked to packed bytes of an array. Deflate can pack a thousandfold; images that are worth
    # anything pack nowhere near it.
    max_expansion: Positive = 250


class Prepare(Limits):
    """What images may be, and how they are split. Fractions are of all, in expectation.

    Half of the validation images calibrate the anomaly measure; the others say when to end.
    """

    raised_by: ClassVar[str] = "--max-pixels, or prepare.max_pixels in params.yaml"

    seed: Seed = 0
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _leave_images_to_train_on(self) -> Prepare:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction must add up to less than 1")
        return self


class Train(_Section):
    """The model's sizes and how it is trained."""

    # Where what is `auto` comes from: kept from the champion if there is one, or from the data.
    auto: Literal["champion", "data"] = "champion"
    # What of the model is here has its meaning in `VAEConfig`, and but for `auto` its defaults.
    seed: Seed = VAEConfig.seed
    latent_dim: Annotated[Positive, OrAuto()] = AUTO
    network: Annotated[str, AfterValidator(check_network)] = VAEConfig.network
    # A YAML list arrives as a Python list: let that one become a tuple, and nothing else.
    filters: Annotated[Filters, OrAuto()] = AUTO
    depth: Annotated[Positive, OrAuto()] = AUTO
    hidden_units: Annotated[Positive, OrAuto()] = AUTO
    likelihood: Annotated[Likelihood, OrAuto()] = AUTO
    levels: Annotated[Levels, OrAuto()] = AUTO
    mixtures: Positive = VAEConfig.mixtures
    binarize: Annotated[Binarize, OrAuto()] = AUTO
    prior: Prior = VAEConfig.prior
    prior_couplings: Positive = VAEConfig.prior_couplings
    prior_hidden_units: Positive = VAEConfig.prior_hidden_units
    objective: Objective = VAEConfig.objective
    samples: Positive = VAEConfig.samples
    beta: Annotated[float, Field(ge=0)] = VAEConfig.beta
    kl_warmup_epochs: Annotated[Natural, OrAuto()] = AUTO
    free_bits: Annotated[float, Field(ge=0)] = VAEConfig.free_bits
    gradient_clip: Annotated[float, Field(ge=0)] = VAEConfig.gradient_clip
    gradient_limit: Annotated[float, Field(gt=0)] = VAEConfig.gradient_limit
    epochs: Annotated[Positive, OrAuto()] = AUTO
    finish_epochs: Annotated[int, Field(ge=0)] = 0
    finish_samples: Annotated[int, Field(ge=2)] = 8
    patience: Annotated[Natural, OrAuto()] = AUTO
    precision: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    jit: Literal["auto"] | bool = "auto"
    batch_size: Annotated[Positive, OrAuto()] = AUTO
    learning_rate: Annotated[float, Field(gt=0)] = 0.002
    learning_rate_schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    plateau_epochs: Positive = 5
    weight_average: Annotated[float, Field(ge=0, lt=1)] = 0.999
    skipped_steps_limit: Positive = 100
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 1.0

    def model(self, image_shape: tuple[int, int, int], steps_per_epoch: int) -> VAEConfig:
        """Return the model that the section describes.

        Args:
            image_shape: `(height, width, channels)`.
            steps_per_epoch: by which the warm-up's epochs become steps.

        Raises:
            ValueError: two keys do not go together, or one is still `auto`.
        """
        ours = {field.name for field in fields(VAEConfig)} & set(type(self).model_fields)
        values = {name: getattr(self, name) for name in ours}
        if left := [f"train.{name}" for name, value in values.items() if value == AUTO]:
            raise ValueError(f"{', '.join(sorted(left))}: choose a value, none is auto any more")
        return VAEConfig(
            image_shape=image_shape,
            kl_warmup_steps=self.kl_warmup_epochs * steps_per_epoch,
            **values,
        )

    @classmethod
    def auto_keys(cls) -> list[str]:
        """List the keys that may be `auto` until `vaeflow.config.auto` has chosen a value."""
        return [key for key in cls.model_fields if _may_be_auto(cls, key)]

    def with_values(self, changes: Mapping[str, Any]) -> Train:
        """Return the section with other values.

        Raises:
            ConfigError: one is not allowed, or does not go with the others.
        """
        values = {**self.model_dump(), **changes}
        return validate({"train": values}, "train, with what auto stands for").train

    @model_validator(mode="after")
    def _fit_together(self) -> Train:
        set_ones = {
            field.name: value
            for field in fields(VAEConfig)
            if (value := getattr(self, field.name, AUTO)) != AUTO
        }
        VAEConfig((1, 1, 1), **set_ones)
        if self.finish_epochs and (self.free_bits or self.objective != "elbo"):
            raise ValueError(
                "finish_epochs must be 0 unless objective is elbo and free_bits is 0: it is from "
                "there that they change to importance_weighted"
            )
        for key in ("kl_warmup_epochs", "finish_epochs"):
            value = getattr(self, key)
            if AUTO not in (value, self.epochs) and value > self.epochs:
                raise ValueError(f"{key} must be at most epochs")
        return self


class Evaluate(_Section):
    """The bound on the test split, and what the anomaly measure notices."""

    seed: Seed = 0
    importance_samples: Annotated[int, Field(ge=1, le=5000)] = 200
    estimated_samples: Annotated[int, Field(ge=0, le=5000)] = 0
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01


class Export(_Section):
    """The bundle, and the name it is registered under."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)] = "vae"


class Registry(_Section):
    """What a challenger must show before it becomes champion."""

    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    false_promotions: Annotated[float, Field(gt=0, lt=1)] = 0.01
    images: Annotated[int, Field(ge=2)] = 2000
    samples: Positive = 64
    min_active_units: Annotated[int, Field(ge=0)] = 1


class Drift(_Section):
    """When a batch of images counts as other than those the model was validated on."""

    images: Annotated[int, Field(ge=2)] = 5000
    false_alarms: Annotated[float, Field(ge=0.001, lt=1)] = 0.002
    smallest_distance: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Parameters(_Section):
    """All of `params.yaml`."""

    prepare: Prepare = Prepare()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    registry: Registry = Registry()
    drift: Drift = Drift()

    def sha256(self) -> str:
        """Return a digest of the values, defaults included, independent of the file's layout."""
        resolved = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(resolved.encode()).hexdigest()

    def flat(self) -> dict[str, object]:
        """Return `{"section.key": value}`, as tracked in MLflow."""
        return {
            f"{section}.{key}": value
            for section, values in self.model_dump(mode="json").items()
            for key, value in values.items()
        }


def load_parameters(path: Path) -> Parameters:
    """Read and validate a parameter file.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or a value is not allowed. All faults
            are named in one message.
    """
    return validate(read_parameters(path), str(path))


def read_parameters(path: Path) -> dict[str, Any]:
    """Read what a parameter file says, whether allowed or not.

    Raises:
        ConfigError: the file is missing, not YAML, or has no sections.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        # The YAML 1.2 reader that DVC uses: both must read the same values (1e-3 is a number).
        content = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing. Restore it: git checkout {path.name}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections ({_listed(Parameters)}), found {content!r}.")
    return content


def validate(content: dict[str, Any], origin: str) -> Parameters:
    """Make parameters of sections of keys and values.

    Args:
        content: the sections.
        origin: where they are from, for the message.

    Raises:
        ConfigError: a key or a value is not allowed. All faults are named in one message.
    """
    try:
        return Parameters.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ConfigError(f"{origin}:\n{faults}") from None


def _explain(fault: ErrorDetails) -> str:
    """Explain one pydantic fault in a line: key, what is wrong, what would be right."""
    location = fault["loc"]
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        candidates = _keys_beside(location)
        nearest = difflib.get_close_matches(str(location[-1]), candidates, n=1, cutoff=0.0)
        return f"{key}: no such key; did you mean {candidates[nearest[0]]}?"
    shown = repr(fault["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    section = type(getattr(Parameters(), str(location[0]), None))
    auto = ", or 'auto'" * (len(location) == 2 and _may_be_auto(section, str(location[1])))
    return f"{key}: {fault['msg']}{auto}, found {shown}."


def _may_be_auto(section: type, key: str) -> bool:
    """Return whether a key of a section allows `auto`."""
    field = getattr(section, "model_fields", {}).get(key)
    return field is not None and any(isinstance(part, OrAuto) for part in field.metadata)


def _keys_beside(location: tuple[Any, ...]) -> dict[str, str]:
    """List valid keys, last part to dotted: of the section it is in, else all keys and sections."""
    sections = Parameters.model_fields
    inside = [location[0]] if len(location) > 1 else list(sections)
    keys = {
        key: f"{section}.{key}"
        for section in inside
        for key in type(getattr(Parameters(), section)).model_fields
    }
    return keys if len(location) > 1 else keys | {section: section for section in sections}


def _listed(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)
