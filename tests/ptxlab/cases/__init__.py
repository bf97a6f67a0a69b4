"""Test cases for every instruction that ptxlab knows; the expected results do not use ptxlab's code."""
