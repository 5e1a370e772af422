"""Adding, checking and splitting images; mini-batches."""
