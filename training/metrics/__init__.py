"""Modules of the `evaluate` library."""
