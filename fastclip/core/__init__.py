"""Clipping as torch does it: collect gradients, prepare them, reduce them to a norm, scale or clamp them."""
