"""Gradient clipping that replaces torch's without a change in the caller's code."""

__version__ = "0.1.0"
