"""The folders that tests refer to. A copy of `tests/` alone has no repository around it: check that a folder exists."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
KERNELS = ROOT / "kernels"
