"""Readers of images, one module a kind of source."""
