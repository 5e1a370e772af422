"""Sweeps: many trainings, each with other parameters, that look for the best ones."""
