"""The kernels (installed as `fastclip.kernels`): one file an operation, in Triton for GPUs and in C for CPUs."""
