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
      images, those that score lower, 0 to 100); and, where the bundle has a measure of it,
      `anomaly` (about 1 is usual), `p_value` (how often usual images have as much) and `anomalous`
      (1 where that is too seldom);
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
            return self._score(model_input)
        if output == "encode":
            return self.bundle.encode(model_input)._asdict()
        if output == "reconstruct":
            return {"reconstruction": self.bundle.reconstruct(model_input)}
        raise VaeflowError(f"output: {output!r}; expected one of {', '.join(OUTPUTS)}.")

    def _score(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if self.bundle.detects:
            found = self.bundle.detect(images)._asdict()
            del found["maps"]
        else:
            found = {"score": self.bundle.score(images)}
        found["percentile"] = 100 * self.bundle.score_rank(found["score"])
        return {name: values.astype("float32") for name, values in found.items()}


mlflow.models.set_model(BundleModel())
