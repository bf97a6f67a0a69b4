"""Benchmarks. Each is a command, for example `python -m benchmarks.cpu`."""
