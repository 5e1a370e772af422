"""A bundle as a standard MLflow model: the same files, and what MLflow needs to run them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import vaeflow
from vaeflow.bundle.manifest import Manifest

# Where the bundle lies in the model.
BUNDLE_PATH = "artifacts/bundle"
# What `vaeflow.bundle` imports; the package itself comes along as code.
REQUIREMENTS = ("numpy", "onnxruntime", "pydantic")


def write_mlflow_model(folder: Path, bundle: Path, manifest: Manifest) -> None:
    """Write the MLflow model of a bundle into a folder that does not exist yet.

    It has a tensor signature, an input example and pinned requirements, and holds code instead of
    a pickled object. The package comes along, so that `mlflow models serve` and `build-docker`
    need no index that knows it.
    """
    import mlflow.pyfunc
    import numpy as np

    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"bundle": str(bundle)},
        code_paths=[str(Path(vaeflow.__file__).parent)],
        signature=_signature(manifest),
        input_example=(np.zeros((1, *manifest.image.shape), np.float32), {"output": "score"}),
        pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", *REQUIREMENTS)],
    )


def _signature(manifest: Manifest):
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    number = np.dtype(np.float32)
    return ModelSignature(
        inputs=Schema([TensorSpec(number, (-1, *manifest.image.shape))]),
        outputs=Schema([TensorSpec(number, (-1,), name) for name in ("score", "percentile")]),
        params=ParamSchema([ParamSpec("output", "string", "score")]),
    )
