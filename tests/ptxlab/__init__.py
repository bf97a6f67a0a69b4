"""ptxlab: what Triton compiles for NVIDIA GPUs, executed on CPU threads.

`activate()` lets Triton's own JIT, launcher and NVIDIA driver work without a GPU, against a stand-in libcuda. Every
`kernel[grid](...)` on CPU tensors then goes the whole way (specialisation, PTX, ptxas, launcher, driver), and the PTX
is executed, one thread a warp, several programs at once, with each access to memory checked.

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
