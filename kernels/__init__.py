"""The device code: one file an operation, and the layout of the chunk table (installed as `fastclip.kernels`)."""
