"""Kernels and reference of ``bias_dropout_add``."""
