"""Batches: scores and drift."""
