"""Noticing exploding gradients: what every step was like, triggers on jumps, logs and pictures."""
