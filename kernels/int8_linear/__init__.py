"""Kernels and reference of ``int8_linear`` and ``int8_mm``."""
