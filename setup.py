"""The one thing that `pyproject.toml` cannot declare: the kernels for CPUs, an extension that may be missing.

It is built against Python's stable ABI, so that one wheel a platform serves every version of Python. Where there is no
compiler the installation succeeds without it, and NumPy takes over (`python -m fastclip info` says so).
"""

import sysconfig

from setuptools import Extension, setup

# A build of Python without the GIL has no stable ABI.
HAS_STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "fastclip.kernels.native",
            sources=["kernels/module.c", "kernels/cpu.c", "kernels/adapt.c"],
            depends=[f"kernels/{name}.h" for name in ("cpu", "level", "elements", "reduce", "apply", "clamp", "adapt")],
            # No fused multiply-adds: the result has the same bits whatever the processor. No paths of the machine that
            # builds it, which -g brings: the same sources make the same file.
            extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")] if HAS_STABLE_ABI else [],
            py_limited_api=HAS_STABLE_ABI,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if HAS_STABLE_ABI else {},
)
