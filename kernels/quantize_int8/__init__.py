"""Kernels and reference of ``quantize_int8``."""
