"""Clipping by any rule: groups of gradients, their norms, a formula from norms to coefficients."""
