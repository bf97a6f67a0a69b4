"""ptxlab: what Triton compiles for NVIDIA GPUs, executed on CPU threads.

`activate()` lets Triton's own JIT, launcher and NVIDIA driver work without a GPU, with a stand-in for libcuda. Every
`kernel[grid](...)` on CPU tensors then takes the real path (specialisation, PTX, ptxas, launcher, driver). The PTX is
executed with a thread for each warp and several programs at once, and every memory access is checked.

    ptxlab.activate(90)
    with ptxlab.recording() as launched:
        kernel[grid](cpu_tensor, ...)
"""

import os

# Triton 3.10 changes the default; kernels are tested as they are compiled today. Triton reads it when it compiles.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from .driver import activate, allow, check, deactivate, launches, recording
from .kernel import CACHE, Kernel, PtxError
from .parse import Unsupported
from .races import RACE_FOUND, run_under_sanitizer

__all__ = [
    "CACHE",
    "RACE_FOUND",
    "Kernel",
    "PtxError",
    "Unsupported",
    "activate",
    "allow",
    "check",
    "deactivate",
    "launches",
    "recording",
    "run_under_sanitizer",
]
