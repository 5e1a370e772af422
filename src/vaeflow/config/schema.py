"""`params.yaml` as frozen, validated models.

One section per DVC stage, of the same name, then those of what comes after the stages. An unknown
key is refused with the nearest valid one; a wrong type is refused with the key and what would be
right. Nothing is converted silently.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vaeflow.config.model import Binarize, Likelihood, Network, Objective, Prior, VAEConfig
from vaeflow.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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
    """What images may be, and how they are split. Fractions are of all, in expectation."""

    raised_by: ClassVar[str] = "--max-pixels, or prepare.max_pixels in params.yaml"

    seed: Seed = 0
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _leave_images_to_train_on(self) -> Prepare:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction must add up to less than 1")
        return self


class Train(_Section):
    """The model's sizes and how it is trained."""

    # What of the model is here has its defaults and its meaning in `VAEConfig`.
    seed: Seed = VAEConfig.seed
    latent_dim: Positive = VAEConfig.latent_dim
    network: Network = VAEConfig.network
    # A YAML list arrives as a Python list: let that one become a tuple, and nothing else.
    filters: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1, max_length=8)] = (
        VAEConfig.filters
    )
    depth: Positive = VAEConfig.depth
    hidden_units: Positive = VAEConfig.hidden_units
    likelihood: Likelihood = VAEConfig.likelihood
    levels: Annotated[int, Field(ge=2, le=256)] = VAEConfig.levels
    mixtures: Positive = VAEConfig.mixtures
    binarize: Binarize = VAEConfig.binarize
    prior: Prior = VAEConfig.prior
    prior_couplings: Positive = VAEConfig.prior_couplings
    prior_hidden_units: Positive = VAEConfig.prior_hidden_units
    objective: Objective = VAEConfig.objective
    samples: Positive = VAEConfig.samples
    beta: Annotated[float, Field(ge=0)] = VAEConfig.beta
    kl_warmup_epochs: Annotated[int, Field(ge=0)] = 0
    free_bits: Annotated[float, Field(ge=0)] = VAEConfig.free_bits
    gradient_clip: Annotated[float, Field(ge=0)] = VAEConfig.gradient_clip
    gradient_limit: Annotated[float, Field(gt=0)] = VAEConfig.gradient_limit
    epochs: Positive = 60
    finish_epochs: Annotated[int, Field(ge=0)] = 0
    finish_samples: Annotated[int, Field(ge=2)] = 8
    patience: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    jit: Literal["auto"] | bool = "auto"
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.003
    learning_rate_schedule: Literal["constant", "cosine", "plateau"] = "constant"
    plateau_epochs: Positive = 5
    weight_average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    skipped_steps_limit: Positive = 100
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 1.0

    def model(self, image_shape: tuple[int, int, int], steps_per_epoch: int) -> VAEConfig:
        """Return the model that the section describes.

        Args:
            image_shape: `(height, width, channels)`.
            steps_per_epoch: by which the warm-up's epochs become steps.

        Raises:
            ValueError: two keys do not go together.
        """
        ours = {field.name for field in fields(VAEConfig)} & set(type(self).model_fields)
        return VAEConfig(
            image_shape=image_shape,
            kl_warmup_steps=self.kl_warmup_epochs * steps_per_epoch,
            **{name: getattr(self, name) for name in ours},
        )

    @model_validator(mode="after")
    def _fit_together(self) -> Train:
        self.model((1, 1, 1), 1)
        if self.finish_epochs and (self.free_bits or self.objective != "elbo"):
            raise ValueError(
                "finish_epochs must be 0 unless objective is elbo and free_bits is 0: it is from "
                "there that they change to importance_weighted"
            )
        if self.kl_warmup_epochs > self.epochs:
            raise ValueError("kl_warmup_epochs must be at most epochs")
        if self.finish_epochs > self.epochs:
            raise ValueError("finish_epochs must be at most epochs")
        return self


class Evaluate(_Section):
    """The bound on the test split."""

    seed: Seed = 0
    importance_samples: Annotated[int, Field(ge=1, le=5000)] = 200


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
    return f"{key}: {fault['msg']}, found {shown}."


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
