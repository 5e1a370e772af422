"""What `auto` in `params.yaml` means: parameters that follow from the images.

These are all the rules. `vaeflow train` applies them to what `prepare` found out, prints what it
has chosen, and records it with the run, the model and the bundle. What is set explicitly wins.
`docs/explanation/benchmarks.md` has how near the models come to the best of a search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vaeflow.config.schema import AUTO, Train
from vaeflow.errors import ConfigError, WorkspaceError

# What a run records of its images, beside its parameters.
SHAPE_KEY = "images.shape"
FEW_IMAGES = 1_000  # to train on; fewer are soon known by heart
SOME_IMAGES, MANY_IMAGES = 2_000, 20_000
# Epochs of a single image: they fall with the cube root of how many there are, since more images
# need more steps, and fewer looks at each.
EPOCHS, FEWEST_EPOCHS, MOST_EPOCHS = 1_500, 10, 150
VALUES = 1.5e9  # that may go through the networks


class DataFacts(NamedTuple):
    """What is known of the images.

    Attributes:
        image_shape: `(height, width, channels)`.
        images: how many there are to train on.
        levels: values that a pixel may have, evenly spaced from 0 to 255.
    """

    image_shape: tuple[int, int, int]
    images: int
    levels: int


def read_facts(prepared: Path) -> DataFacts:
    """Read what `prepare` found out, from the folder that it wrote.

    Raises:
        WorkspaceError: it was written by an older version.
    """
    path = prepared / "dataset.json"
    about = json.loads(path.read_text())
    if "levels" not in about:
        raise WorkspaceError(f"{path} is of an older version. Make it anew: dvc repro prepare")
    height, width, channels = about["image_shape"]
    return DataFacts((height, width, channels), about["images"]["train"], about["levels"])


def choose(facts: DataFacts) -> dict[str, Any]:
    """Choose a value for every parameter that may be `auto`."""
    height, width, channels = facts.image_shape
    values = height * width * channels
    small = values <= 256
    few_and_small = small and facts.images < SOME_IMAGES
    # Halved until about six to twelve pixels are left: what is there is no local matter any more.
    halvings = min(6, max(2, round(math.log2(min(height, width) / 6))))
    # Dimensions too many cost little: their KL goes to zero.
    latent_dim = min(256, max(8, 8 * round(1.5 * math.sqrt(values) / 8)))
    epochs = min(EPOCHS / facts.images ** (1 / 3), max(VALUES / (values * facts.images), 1))
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(epochs)))
    return {
        # Proper ones: what is compared and reported is a bound of the images' probability.
        "likelihood": "bernoulli" if facts.levels == 2 else "mixture_logistic",
        "levels": facts.levels,
        "binarize": "none",
        "latent_dim": latent_dim,
        "filters": tuple(min(128, 32 * 2**level) for level in range(halvings)),
        "depth": 1,
        # Most of the weights, and of the time of a step of few images, are between these.
        "hidden_units": 128 if small else 256 if facts.images < SOME_IMAGES else 512,
        # Else the decoder soon learns to do without the latent.
        "kl_warmup_epochs": epochs // 10,
        "batch_size": 128 if facts.images >= MANY_IMAGES else 32 if few_and_small else 64,
        "epochs": epochs,
        # Where images are few the best epoch is not the last; where they are many it is. None is
        # stopped early: its learning rate is still high then, and its weights far from their best.
        "patience": 0 if facts.images >= MANY_IMAGES else epochs // 2,
    }


def open_keys(settings: Train) -> list[str]:
    """List the parameters that are `auto` and depend on the images."""
    return [key for key in settings.auto_keys() if getattr(settings, key) == AUTO]


def resolve(
    settings: Train, facts: DataFacts, kept: Mapping[str, Any] | None = None
) -> tuple[Train, dict[str, Any]]:
    """Replace every `auto`.

    Args:
        settings: as in `params.yaml`.
        facts: of the images.
        kept: values that are kept instead of chosen, by key: a champion's.

    Returns:
        The settings, none of them `auto`, and those values of them that were.

    Raises:
        ConfigError: what was chosen does not go with what is set.
    """
    chosen = choose(facts) | dict(kept or {})
    if settings.binarize not in (AUTO, "none") and not (kept and "likelihood" in kept):
        chosen["likelihood"] = "bernoulli"
    changes = {key: chosen[key] for key in open_keys(settings)}
    epochs = changes.get("epochs", settings.epochs)
    for key in {"kl_warmup_epochs", "patience"} & set(changes):
        # Of the epochs there are, where these were not chosen with them.
        changes[key] = min(changes[key], epochs // 10 if key == "kl_warmup_epochs" else epochs)
    return settings.with_values(changes), changes


def kept_values(
    settings: Train, facts: DataFacts, champion: Mapping[str, str] | None
) -> dict[str, Any] | None:
    """Return the values of a champion that are kept in the place of `auto`; None without any.

    Args:
        settings: as in `params.yaml`.
        facts: of the images.
        champion: what its run recorded, `section.key` to text; None where there is no champion.
    """
    if champion is None or champion.get(SHAPE_KEY) != str(list(facts.image_shape)):
        return None
    texts = {key: champion.get(f"train.{key}", AUTO) for key in choose(facts)}
    read = {key: _read(text) for key, text in texts.items() if text != AUTO}
    try:
        settings.with_values(read)
    except ConfigError:
        return None  # of a version that knew other values
    return read


def _read(text: str) -> Any:
    """Read a value as a run records it: a number, numbers in brackets, or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def plain(value: Any) -> str:
    """Return a value as it would stand in `params.yaml`."""
    return str(list(value)) if isinstance(value, tuple) else str(value)


def describe(facts: DataFacts) -> str:
    """Say what the images are."""
    height, width, channels = facts.image_shape
    kind = "colour" if channels >= 3 else "grey"
    kind = "black and white" if facts.levels == 2 else f"{kind}, {facts.levels} levels"
    return f"{facts.images:,} images to train on, {height} x {width}, {kind}"


def small_data_warning(facts: DataFacts) -> str | None:
    """Return a warning where there are too few images to learn much from; else None."""
    if facts.images >= FEW_IMAGES:
        return None
    return (
        f"{facts.images} images to train on are few: the model will soon know them by heart. The "
        "weights of the epoch that was best in validation are kept where train.patience is not 0; "
        "judge by the validation images, and gather more."
    )
