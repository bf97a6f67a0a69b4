"""The machine that runs the instructions: faults, barriers of several warps, device functions, the compile cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paths
import pytest
from numpy.typing import NDArray
from ptxlab import Kernel, PtxError, Unsupported
from ptxlab.cases.modules import module
from ptxlab.kernel import merge

LOCATION = '.file 1 "kernels" "clip.py"\n'


def _run(body: str, *, threads: int = 32, programs: int = 1, words: int = 1, **options: int) -> NDArray[np.uint64]:
    """Run PTX on zeros; return the outputs that it stored from `%out` on, `words` for each thread."""
    kernel = Kernel(
        module("machine", body, input_bytes=8, output_bytes=8 * words, threads=threads), 1024, optimize="-O0"
    )
    inputs = np.zeros(threads * programs, np.uint64)
    outputs = np.zeros((threads * programs, words), np.uint64)
    ranges = [(array.ctypes.data, array.nbytes) for array in (inputs, outputs)]
    kernel.launch((programs,), [start for start, _ in ranges], ranges, **options)
    return outputs


FAULTS = {
    "out-of-bounds global load": ".reg .b32 a; ld.global.b32 a, [%in+256];",
    "out-of-bounds global store": ".reg .b32 a; mov.b32 a, 0; st.global.b32 [%out+-256], a;",
    "out-of-bounds global atomic": ".reg .b32 a; mov.b32 a, 0; red.global.add.u32 [%out+256], a;",
    "misaligned global access": ".reg .b32 a, b; ld.global.v2.b32 {a, b}, [%in+4];",
    "out-of-bounds shared access": ".reg .b32 a; mov.b32 a, 1024; st.shared.b32 [a], a;",
    "misaligned shared access": ".reg .b32 a; mov.b32 a, 2; st.shared.b32 [a], a;",
    "bar.sync in divergent code": """.reg .pred p; setp.eq.u32 p, %index, 5; @p bra $over; bar.sync 0; $over:""",
    "bar.sync in divergent code at 0x0, program (0, 0, 0), warp 0": """.reg .pred p; setp.lt.u32 p, %index, 5;
        @p bra $other; bar.sync 0; ret; $other: bar.sync 0;""",
    "shfl from an inactive lane": """.reg .pred p; .reg .b32 a; setp.lt.u32 p, %index, 2;
        @p shfl.sync.idx.b32 a, 0, 9, 31, 3;""",
    "warp-wide instruction in divergent code": """.reg .pred p; .reg .b32 a; setp.lt.u32 p, %index, 2;
        @p redux.sync.add.s32 a, 1, -1;""",
}


@pytest.mark.parametrize(("reason", "body"), FAULTS.items(), ids=FAULTS)
def test_fault(reason: str, body: str) -> None:
    with pytest.raises(PtxError, match=re.escape(reason)):
        _run(body)


def test_fault_names_program_warp_instruction_and_source() -> None:
    body = """.reg .pred p; .reg .b32 a;
        .loc 1 42 7
        setp.eq.u32 p, %index, 165;
        mov.b64 %in, 64;
        @p ld.global.b32 a, [%in+4];
    """
    kernel = Kernel(module("named", body, input_bytes=8, output_bytes=8, threads=64) + LOCATION, optimize="-O0")
    with pytest.raises(PtxError) as raised:
        kernel.launch((4, 1, 1), [0, 0], [])
    message = "out-of-bounds global load at 0x44, program (2, 0, 0), warp 1: @p ld.global.b32 a, [%in+4] (clip.py:42:7)"
    assert str(raised.value) == message


def test_fault_releases_the_warps_that_wait_and_leaves_no_thread() -> None:
    body = """.reg .pred p; .reg .b32 a;
        setp.eq.u32 p, %index, 0;
        @p ld.global.b32 a, [%in+1048576];
        bar.sync 0;
    """
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        with pytest.raises(PtxError, match="out-of-bounds"):
            _run(body, threads=256, programs=8)
    assert len(os.listdir("/proc/self/task")) == before


def test_fault_ends_warps_that_spin() -> None:
    """They wait in a loop for a flag that the faulted warp will never set."""
    body = """.reg .pred p; .reg .b32 a;
        setp.eq.u32 p, %index, 0;
        @p ld.global.b32 a, [%in+1048576];
        $spin:
        ld.volatile.global.b32 a, [%in];
        setp.eq.u32 p, a, 0;
        @p bra $spin;
    """
    with pytest.raises(PtxError, match="out-of-bounds"):
        _run(body, threads=64)


def test_bounds_can_be_left_unchecked() -> None:
    inputs, outputs = np.arange(32, dtype=np.uint64), np.zeros(32, np.uint64)
    body = ".reg .b64 a; ld.global.b64 a, [%in]; st.global.b64 [%out], a;"
    kernel = Kernel(module("copy", body, input_bytes=8, output_bytes=8), optimize="-O0")
    kernel.launch((1,), [inputs.ctypes.data, outputs.ctypes.data], None)
    assert (outputs == inputs).all()
    with pytest.raises(PtxError, match="out-of-bounds"):  # an empty list allows nothing
        kernel.launch((1,), [inputs.ctypes.data, outputs.ctypes.data], [])


def test_merge_joins_what_overlaps_and_keeps_neighbours_apart() -> None:
    assert merge([(100, 10), (105, 20), (125, 5), (0, 0), (40, 4), (41, 1)]) == [(40, 44), (100, 125), (125, 130)]


def test_grid_has_three_dimensions() -> None:
    body = """.reg .b32 a, b, n; .reg .b64 place;
        mov.u32 %index, %ctaid.z; mov.u32 n, %nctaid.y; mov.u32 a, %ctaid.y; mad.lo.s32 %index, %index, n, a;
        mov.u32 n, %nctaid.x; mov.u32 a, %ctaid.x; mad.lo.s32 %index, %index, n, a;
        ld.param.u64 place, [outputs]; mad.wide.u32 place, %index, 8, place;
        mov.u32 b, %ntid.x; add.s32 b, b, %index; st.global.b32 [place], b;
    """
    kernel = Kernel(module("cube", body, input_bytes=0, output_bytes=0), optimize="-O0")
    outputs = np.zeros(24, np.uint64)
    kernel.launch((2, 3, 4), [0, outputs.ctypes.data], [(outputs.ctypes.data, outputs.nbytes)])
    assert outputs.tolist() == list(range(32, 56))


@pytest.mark.parametrize("options", [{}, {"resident": 1}, {"resident": 3, "jitter": 50, "seed": 7}])
def test_barrier_orders_the_warps_of_a_program(options: dict[str, int]) -> None:
    """Each thread stores its index in shared memory and reads that of the opposite thread, in another warp."""
    body = """.reg .b32 a, b; .reg .b64 c;
        mov.u32 a, %tid.x; shl.b32 b, a, 2; add.s32 a, a, %cta;
        st.shared.b32 [b], a;
        bar.sync 0;
        xor.b32 b, b, 508;
        ld.shared.b32 a, [b];
        cvt.u64.u32 c, a; st.global.b64 [%out], c;
    """
    outputs = _run(body, threads=128, programs=16, **options)
    assert outputs.ravel().tolist() == [127 - thread + program for program in range(16) for thread in range(128)]


def test_barrier_does_not_wait_for_warps_that_returned() -> None:
    body = """.reg .pred p; .reg .b64 a;
        mov.u32 %index, %tid.x;
        setp.ge.u32 p, %index, 64;
        @p ret;
        bar.sync 0;
        mov.b64 a, 1; st.global.b64 [%out], a;
        bar.sync 0;
    """
    outputs = _run(body, threads=128, programs=8).reshape(8, 128)
    assert outputs[:, :64].all()
    assert not outputs[:, 64:].any()


def test_shared_memory_is_not_kept_between_programs() -> None:
    body = """.reg .b32 a, b;
        ld.shared.b32 a, [global_smem];
        bar.sync 0;
        mov.b32 b, 7; st.shared.b32 [global_smem], b;
        st.global.b32 [%out], a;
    """
    assert set(_run(body, programs=4, resident=1).ravel().tolist()) == {0xA5A5A5A5}


@pytest.mark.parametrize("meeting", ["bar.sync 0", "shfl.sync.idx.b32 b, a, 0, 31, -1", "vote.sync.any.pred p, p, -1"])
def test_lanes_wait_where_they_must_meet(meeting: str) -> None:
    """The compiler may place a slow path of few lanes after the point where they rejoin the others."""
    body = f""".reg .pred p; .reg .b32 a, b; .reg .b64 c;
        mov.u32 a, 10;
        and.b32 b, %index, 7;
        setp.eq.u32 p, b, 3;
        @p bra $slow;
        $join:
        {meeting};
        cvt.u64.u32 c, a; st.global.b64 [%out], c;
        ret;
        $slow:
        mov.u32 a, 20;
        bra.uni $join;
    """
    outputs = _run(body, threads=64, programs=2).ravel()
    assert outputs.tolist() == [20 if thread % 8 == 3 else 10 for thread in range(128)]


def test_device_function_is_inlined() -> None:
    """It is called twice, and each call needs its own registers, labels and results."""
    function = """.func (.param .b64 result) power(.param .b64 base, .param .b32 exponent)
    {
        .reg .b64 %rd<3>; .reg .b32 %r<2>; .reg .pred %p<2>;
        ld.param.b64 %rd1, [base]; ld.param.b32 %r1, [exponent]; mov.b64 %rd2, 1;
        $L__again:
        setp.eq.u32 %p1, %r1, 0; @%p1 bra $L__done;
        mul.lo.s64 %rd2, %rd2, %rd1; sub.s32 %r1, %r1, 1; bra.uni $L__again;
        $L__done:
        st.param.b64 [result], %rd2; ret;
    }
    """
    call = """{ .param .b64 param0; .param .b32 param1; .param .b64 retval0;
        st.param.b64 [param0], VALUE; st.param.b32 [param1], EXPONENT;
        call.uni (retval0), power, (param0, param1);
        ld.param.b64 RESULT, [retval0]; }
    """
    body = ".reg .b64 a, b; .reg .b32 n; and.b32 n, %index, 3;"
    for value, exponent, result in (("3", "n", "a"), ("a", "2", "b")):
        body += call.replace("VALUE", value).replace("EXPONENT", exponent).replace("RESULT", result)
    body += "st.global.b64 [%out], a; st.global.b64 [%out+8], b;"
    ptx = module("calls", body, input_bytes=8, output_bytes=16)
    header, entry = ptx.split(".visible", 1)
    outputs = np.zeros((32, 2), np.uint64)
    kernel = Kernel(f"{header}{function}.visible{entry}", optimize="-O0")
    kernel.launch((1,), [0, outputs.ctypes.data], [(outputs.ctypes.data, outputs.nbytes)])
    assert outputs.tolist() == [[3 ** (lane % 4), 9 ** (lane % 4)] for lane in range(32)]


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 a, a, a",
        "frobnicate.b32 a, a",
        "add.s32 a, a",
        "ld.local.b32 a, [a]",
        "ld.b32 a, [%in]",
        "bar.sync 0, 64",
        "cvt.s32.f32 a, a",
        "mov.b32 a, somewhere",
        "call.uni nothing",
        "bra $nowhere",
        "setp.lt.f32x2 p, a, a",
    ],
)
def test_what_is_not_known_is_refused_by_name(instruction: str) -> None:
    body = f".reg .b32 a; .reg .pred p;\n{instruction};"
    with pytest.raises(Unsupported) as raised:
        Kernel(module("unknown", body, input_bytes=8, output_bytes=8), optimize="-O0")
    opcode, _, operands = instruction.partition(" ")
    assert opcode in str(raised.value) or operands.split()[-1] in str(raised.value)


def test_missing_compiler_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"install it .*gcc"):
        Kernel(module("no_compiler", "", input_bytes=8, output_bytes=8))


def test_cache_is_shared_by_processes_that_start_together(tmp_path: Path) -> None:
    source = tmp_path / "module.ptx"
    source.write_text(module("together", "", input_bytes=8, output_bytes=8))
    script = f"import ptxlab; ptxlab.Kernel(open({str(source)!r}).read()).launch((1,), [0, 0], [])"
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(paths.TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [(process.returncode, error) for process, error in zip(started, errors, strict=True)] == [(0, "")] * 4
    (cache,) = tmp_path.glob("ptxlab-*")
    assert sorted(path.name for path in cache.rglob("*.*")) == ["source.c", "together.so"]
