"""Shapes and baselines, one file an op."""
