"""The code of a registered MLflow model: a bundle, answering through MLflow's own interface.

MLflow copies this file and the package into the model and runs it from there; nothing is pickled.
"""

from __future__ import annotations

import mlflow
import numpy as np
from mlflow.pyfunc.model import PythonModel

from vaeflow.bundle.runtime import Bundle
from vaeflow.errors import VaeflowError

OUTPUTS = ("score", "encode", "reconstruct")


class BundleModel(PythonModel):
    """Answers `predict(images, params={"output": ...})`.

    Images are float32 in [0, 1], `(count, height, width, channels)`. What is answered is a
    dictionary of float32 arrays, with the images along the first axis:

    - `score`, the default: `score` (minus the ELBO in nats) and `percentile` (of the validation
      images, those that score lower, 0 to 100);
    - `encode`: `mean` and `log_variance` of the posterior, `(count, latent_dim)`;
    - `reconstruct`: `reconstruction`, the shape of the images.
    """

    def load_context(self, context) -> None:
        """Open the bundle, which compares its files with its manifest."""
        self.bundle = Bundle(context.artifacts["bundle"])

    # Without more hints: MLflow would take them for those of the input.
    def predict(self, context, model_input: np.ndarray, params=None):
        """Answer a request; see the class."""
        output = (params or {}).get("output", OUTPUTS[0])
        if output == "score":
            scores = self.bundle.score(model_input)
            percentile = 100 * self.bundle.score_rank(scores)
            return {"score": scores, "percentile": percentile.astype("float32")}
        if output == "encode":
            return self.bundle.encode(model_input)._asdict()
        if output == "reconstruct":
            return {"reconstruction": self.bundle.reconstruct(model_input)}
        raise VaeflowError(f"output: {output!r}; expected one of {', '.join(OUTPUTS)}.")


mlflow.models.set_model(BundleModel())
