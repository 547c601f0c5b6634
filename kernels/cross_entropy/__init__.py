"""Kernels and reference of ``cross_entropy``."""
