"""Kernels and reference of ``dropout_add_norm``."""
