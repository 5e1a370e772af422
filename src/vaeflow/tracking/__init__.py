"""MLflow runs, and the lineage of a model."""
