"""`params.yaml`: its schema, and editing it."""
