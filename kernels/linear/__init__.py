"""Kernel and reference of ``linear`` with few rows."""
