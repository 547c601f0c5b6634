"""Kernels and reference of ``attention``."""
