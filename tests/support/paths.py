"""The folders that tests use. Only TESTS exists for sure: CI also runs a copy of `tests/` without the repository."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
KERNELS = ROOT / "kernels"
