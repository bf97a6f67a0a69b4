"""The kernels (installed as `fastclip.kernels`): one file an operation, Triton for GPUs, C for CPUs."""
