"""Kernels and reference of ``dropout``."""
