"""A bundle as an MLflow pyfunc model, written as code; logged and served by `serve.py`."""

import mlflow
import numpy as np

from vaeflow.bundle.runtime import Bundle


class Encoder(mlflow.pyfunc.PythonModel):
    """Images to the means and log variances of their posteriors."""

    def load_context(self, context):
        """Open the bundle that was logged with the model."""
        self.bundle = Bundle(context.artifacts["bundle"])

    def predict(self, context, model_input, params=None):
        """As the other server answers: both outputs of each image, `(count, 2, latent_dim)`."""
        return np.stack(self.bundle.encode(model_input), axis=1)


mlflow.models.set_model(Encoder())
