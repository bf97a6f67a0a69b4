"""Test cases for every instruction that ptxlab knows, with expected results that owe nothing to its own code."""
