"""`fastclip.patch`, `unpatch` and `patched`, torch's originals, and the command `python -m fastclip run`."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastclip
from fastclip import __main__ as command
from fastclip import switching
from fastclip.core import clipping
from fastclip.foundation import originals
from fastclip.switching import patching

# Other test modules may have imported torch's functions: this warning is about that.
pytestmark = pytest.mark.filterwarnings("ignore:fastclip.patch.. came too late")

NAMES = ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")
CLIP_GRAD_NAMES = {"get_total_norm": "_get_total_norm", "clip_grads_with_norm_": "_clip_grads_with_norm_"}
PLACES = [(torch.nn.utils, name, name) for name in NAMES] + [
    (torch.nn.utils.clip_grad, CLIP_GRAD_NAMES.get(name, name), name) for name in NAMES
]


def held() -> list[object]:
    """The functions that torch's names refer to now."""
    return [getattr(module, attribute) for module, attribute, _ in PLACES]


TORCHS = held()
OURS = [getattr(fastclip, name) for _, _, name in PLACES]


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastclip.unpatch()
    for (module, attribute, _), function in zip(PLACES, TORCHS, strict=True):
        setattr(module, attribute, function)
    fastclip.unpatch()


def parameter(*gradient: float) -> torch.nn.Parameter:
    """A parameter with this gradient."""
    result = torch.nn.Parameter(torch.zeros(len(gradient)))
    result.grad = torch.tensor(gradient)
    return result


def gradient_of(p: torch.nn.Parameter) -> torch.Tensor:
    """A parameter's gradient, which is not None."""
    assert p.grad is not None
    return p.grad


def refuse(*_: object, **__: object) -> None:
    """Stand for a function that must not be called."""
    pytest.fail("a call came to fastclip that should have stayed in torch")


def test_patch_replaces_every_name_and_unpatch_puts_the_same_objects_back() -> None:
    fastclip.patch()
    assert held() == OURS
    fastclip.unpatch()
    assert held() == TORCHS


def test_patch_and_unpatch_are_idempotent() -> None:
    fastclip.patch()
    fastclip.patch()
    assert held() == OURS
    fastclip.unpatch()
    assert held() == TORCHS
    fastclip.unpatch()
    assert held() == TORCHS


def calls_by_attribute(p: torch.nn.Parameter) -> None:
    """Call torch's functions as accelerate and torchtitan do."""
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    torch.nn.utils.clip_grad_value_([p], 0.5)
    norm = torch.nn.utils.get_total_norm([gradient_of(p)])
    torch.nn.utils.clip_grads_with_norm_([p], 0.1, norm)


def calls_by_module(p: torch.nn.Parameter) -> None:
    """Call them as MMEngine does, and as verl does, which imports torch's private names at the call."""
    from torch.nn.utils import clip_grad
    from torch.nn.utils.clip_grad import _clip_grads_with_norm_, _get_total_norm

    clip_grad.clip_grad_norm_([p], 1.0)
    clip_grad.clip_grad_value_([p], 0.5)
    _clip_grads_with_norm_([p], 0.1, _get_total_norm([gradient_of(p)]))


@pytest.mark.parametrize("calls", [calls_by_attribute, calls_by_module])
def test_calls_arrive_however_the_caller_looks_the_name_up(calls: Callable[[torch.nn.Parameter], None]) -> None:
    arrived: list[str] = []
    patching.patch_counting(arrived.append)
    p = parameter(3.0, 4.0)
    calls(p)
    assert arrived == ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"]
    assert torch.linalg.vector_norm(gradient_of(p)).item() == pytest.approx(0.1, rel=1e-4)
    fastclip.unpatch()
    assert held() == TORCHS


def test_the_deprecated_clip_grad_norm_follows() -> None:
    arrived: list[str] = []
    patching.patch_counting(arrived.append)
    with pytest.warns(FutureWarning, match="deprecated"):
        total = torch.nn.utils.clip_grad_norm([parameter(3.0, 4.0)], 1.0)
    assert arrived == ["clip_grad_norm_"]
    assert total.item() == pytest.approx(5.0)


def assert_torch_itself(functions: types.ModuleType) -> None:
    """The four functions of that module do torch's work without a call to fastclip."""
    p = parameter(3.0, 4.0)
    assert functions.clip_grad_norm_([p], 1.0).item() == 5.0
    functions.clip_grad_value_([p], 0.5)
    assert gradient_of(p).tolist() == [0.5, 0.5]
    functions.clip_grads_with_norm_([p], 0.1, functions.get_total_norm([gradient_of(p)]))
    assert torch.linalg.vector_norm(gradient_of(p)).item() == pytest.approx(0.1, rel=1e-4)


def test_the_originals_never_come_back_to_fastclip(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not even through the helpers that torch's clip_grad_norm_ looks up in its module at each call.
    for name in NAMES:
        monkeypatch.setattr(clipping, name, refuse)
    fastclip.patch()
    assert_torch_itself(originals)


def test_the_originals_are_torchs_even_if_first_imported_while_torch_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        monkeypatch.setattr(clipping, name, refuse)
    fastclip.patch()
    spec = importlib.util.find_spec("fastclip.foundation.originals")
    assert spec is not None
    assert spec.loader is not None
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    assert_torch_itself(second)


def test_the_originals_are_exactly_the_four() -> None:
    assert sorted(originals.__all__) == sorted(NAMES)


def test_a_torch_without_one_of_the_four_is_named_in_the_error() -> None:
    with pytest.raises(ImportError, match=r"torch 2\.8 or later: torch \S+ has no torch\.nn\.utils\.get_total_norm"):
        originals._function(types.ModuleType("old"), "get_total_norm")


def test_a_name_that_torch_lacks_is_neither_an_error_nor_created(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.utils, "get_total_norm")
    fastclip.patch()
    assert torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
    assert not hasattr(torch.nn.utils, "get_total_norm")
    fastclip.unpatch()
    assert not hasattr(torch.nn.utils, "get_total_norm")


def theirs(*_: object, **__: object) -> torch.Tensor:
    """Another package's replacement of a function of torch."""
    return torch.tensor(7.0)


def test_unpatch_puts_back_what_somebody_else_had_put_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", theirs)
    fastclip.patch()
    assert torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
    fastclip.unpatch()
    assert torch.nn.utils.clip_grad_norm_ is theirs


def test_unpatch_leaves_what_somebody_else_put_there_since_and_says_so() -> None:
    fastclip.patch()
    torch.nn.utils.clip_grad_norm_ = theirs
    with pytest.warns(UserWarning, match=r"torch\.nn\.utils\.clip_grad_norm_ \(now \S*test_patching\.theirs\)") as seen:
        fastclip.unpatch()
    assert [warning.filename for warning in seen] == [__file__]
    assert torch.nn.utils.clip_grad_norm_ is theirs
    assert held()[1:] == TORCHS[1:]


@pytest.mark.parametrize("patch_again", [False, True])
def test_another_unpatch_finishes_when_theirs_is_gone(patch_again: bool) -> None:
    fastclip.patch()
    torch.nn.utils.clip_grad_norm_ = theirs
    with pytest.warns(UserWarning, match="left in place"):
        fastclip.unpatch()
    torch.nn.utils.clip_grad_norm_ = fastclip.clip_grad_norm_  # they restore what they had found
    if patch_again:
        fastclip.patch()
        assert held() == OURS
    fastclip.unpatch()
    assert held() == TORCHS


def test_patched_ends_with_its_block_by_an_exception_too() -> None:
    with fastclip.patched():
        assert held() == OURS
    assert held() == TORCHS

    def fail() -> None:
        with fastclip.patched():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert held() == TORCHS


def test_patched_nests() -> None:
    with fastclip.patched():
        with fastclip.patched():
            assert held() == OURS
        assert held() == OURS
    assert held() == TORCHS


def test_patched_is_a_decorator() -> None:
    @fastclip.patched()
    def inside() -> list[object]:
        return held()

    assert inside() == OURS
    assert held() == TORCHS
    assert inside() == OURS


def test_patch_outlasts_a_block_around_it_or_after_it() -> None:
    with fastclip.patched():
        fastclip.patch()
    assert held() == OURS
    with fastclip.patched():
        pass
    assert held() == OURS


def test_unpatch_inside_a_block_counts_at_once_and_for_good() -> None:
    with fastclip.patched():
        fastclip.unpatch()
        assert held() == TORCHS
    assert held() == TORCHS
    with fastclip.patched():
        fastclip.unpatch()
        fastclip.patch()
    assert held() == OURS


def test_overlapping_blocks_of_several_threads_stay_patched_until_the_last_ends() -> None:
    wrong: list[list[object]] = []

    def work() -> None:
        for _ in range(50):
            with fastclip.patched():
                time.sleep(0)
                if held() != OURS:
                    wrong.append(held())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert held() == TORCHS


@pytest.fixture
def too_early(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that imported two of torch's functions before the patch, one of them under another name."""
    module = types.ModuleType("their_trainer.loop")
    source = "from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_ as by_value"
    exec(source, vars(module))  # noqa: S102
    monkeypatch.setitem(sys.modules, "their_trainer.loop", module)
    return module


@contextlib.contextmanager
def by_patch() -> Iterator[None]:
    """A context manager that calls `patch()`."""
    fastclip.patch()
    yield


def norm_of_bf16(**arguments: Any) -> torch.Tensor:
    """The result of torch's name for a gradient whose norm bf16 cannot represent."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    p.grad = torch.full((3,), 1.0, dtype=torch.bfloat16)
    norm: torch.Tensor = torch.nn.utils.clip_grad_norm_([p], 10.0, **arguments)
    return norm


def test_patched_with_a_dtype_for_norms() -> None:
    """The dtype that a caller asks for takes precedence."""
    fastclip.patch(norm_dtype=torch.float32)
    assert norm_of_bf16().dtype == torch.float32
    assert norm_of_bf16().item() == pytest.approx(3**0.5, rel=1e-6)
    assert norm_of_bf16(norm_dtype=torch.float64).dtype == torch.float64
    assert norm_of_bf16(foreach=True).dtype == torch.float32
    assert clip_positionally().dtype == torch.float32
    grads = [torch.ones(3, dtype=torch.bfloat16)]
    total: Any = torch.nn.utils.get_total_norm
    assert total(grads).dtype == torch.float32
    assert total(grads, dtype=None).dtype == torch.float32
    assert total(grads, dtype=torch.float64).dtype == torch.float64
    assert total(grads, 2.0, False, None, torch.float64).dtype == torch.float64
    assert torch.nn.utils.clip_grad_value_ is fastclip.clip_grad_value_
    fastclip.unpatch()
    assert held() == TORCHS
    with fastclip.patched(norm_dtype=torch.float64):
        assert norm_of_bf16().dtype == torch.float64
    with fastclip.patched():
        assert norm_of_bf16().dtype == torch.bfloat16


def clip_positionally() -> torch.Tensor:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    p.grad = torch.full((3,), 1.0, dtype=torch.bfloat16)
    return torch.nn.utils.clip_grad_norm_([p], 10.0, 2.0, False, True)


def test_patched_again_with_another_dtype_for_norms() -> None:
    with fastclip.patched(norm_dtype=torch.float32):
        fastclip.patch()  # it asks for no dtype
        with pytest.raises(RuntimeError, match=r"norm_dtype=torch.float32, which cannot become torch.float64"):
            fastclip.patch(norm_dtype=torch.float64)
        fastclip.patch(norm_dtype=torch.float32)
    assert norm_of_bf16().dtype == torch.float32
    fastclip.unpatch()
    fastclip.patch()
    with pytest.raises(RuntimeError, match="norm_dtype=None"), fastclip.patched(norm_dtype=torch.float32):
        pass
    assert norm_of_bf16().dtype == torch.bfloat16


def test_patched_with_what_is_no_dtype_for_norms_changes_nothing() -> None:
    with pytest.raises(TypeError, match="`norm_dtype` must be a floating-point dtype"):
        fastclip.patch(norm_dtype=torch.int64)
    assert held() == TORCHS


@pytest.mark.parametrize("patching_it", [by_patch, fastclip.patched])
@pytest.mark.usefixtures("too_early")
def test_patch_names_the_modules_that_it_comes_too_late_for(
    patching_it: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    with (
        pytest.warns(UserWarning, match=r"too late for .*their_trainer\.loop \(clip_grad_norm_, by_value\)") as seen,
        patching_it(),
    ):
        assert held() == OURS
    message = str(seen[0].message)
    assert "python -m fastclip run" in message
    assert "torch.nn.utils (" not in message
    # It points at the line that patched.
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.usefixtures("too_early")
def test_a_patch_that_changes_nothing_does_not_warn() -> None:
    with pytest.warns(UserWarning, match="too late"):
        fastclip.patch()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastclip.patch()
        with fastclip.patched():
            pass
    assert not seen


@pytest.mark.usefixtures("too_early")
def test_where_warnings_are_errors_a_patch_that_came_too_late_leaves_torch_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="too late"):
            fastclip.patch()
    assert held() == TORCHS
    fastclip.unpatch()
    assert held() == TORCHS


def test_a_module_that_holds_only_torchs_module_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("in_time")
    exec("import torch\nfrom torch.nn.utils import clip_grad", vars(module))  # noqa: S102
    monkeypatch.setitem(sys.modules, "in_time", module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastclip.patch()
    assert not [warning for warning in seen if "in_time" in str(warning.message)]


# The command. Scripts that do not import torch run in a tenth of a second, because `run` does not import it either.


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in this folder, with the same fastclip as here."""
    package_folder = str(Path(fastclip.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package_folder, "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write(path: Path, source: str) -> Path:
    """Write a script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


FACTS = """
    import inspect, pickle, sys
    class Point:
        pass
    def here():
        return inspect.currentframe().f_code.co_filename
    print(sys.argv, sys.path[0], __name__, __file__, __package__, __doc__)
    print(__spec__ and __spec__.name, type(__loader__).__name__, here(), inspect.getsource(Point))
    print(type(pickle.loads(pickle.dumps(Point()))) is Point, sys.modules["__main__"].Point is Point)
    print(sorted(name for name in globals() if name != "__annotations__"), "torch" in sys.modules)
    print(sys.excepthook is sys.__excepthook__, type(__builtins__))
"""
FAILURE = """
    def inner():
        raise ValueError("no such luck")
    def outer():
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outer") from error
    outer()
"""
HOOKED = """
    import sys
    def hook(kind, error, traceback):
        print("hook", kind, error, sys.modules["__main__"].hook is hook)
    sys.excepthook = hook
    1 / 0
"""
SCRIPTS = {
    "facts": FACTS,
    "exit with a status": "import sys\nsys.exit(3)",
    "exit with a message": "import sys\nsys.exit('stopped')",
    "exit at once": "import os\nos._exit(5)",
    "exception": FAILURE,
    "its own excepthook": HOOKED,
    "syntax error": "x = (1,\ny = 2\n",
    "interrupted": "raise KeyboardInterrupt",
    "import error": "import no_such_module_anywhere",
    "source in another encoding": "# coding: latin-1\nprint(len('\u00e9'))",
    "exit handler and thread": """
        import atexit, sys, threading, time
        class Late: pass
        def late():
            time.sleep(0.1)
            print(sys.modules["__main__"].Late)
        atexit.register(lambda: print("at exit", Late))
        threading.Thread(target=late).start()
    """,
}


@pytest.mark.parametrize("source", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_run_does_what_python_does_with_a_script(source: str, tmp_path: Path) -> None:
    write(tmp_path / "some where" / "train.py", source)
    script = [os.path.join("some where", "train.py"), "--lr", "0.1", "-v", "--", "-m", ""]
    plain = python(*script, folder=tmp_path)
    ours = python("-m", "fastclip", "run", *script, folder=tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize("source", [FACTS, FAILURE, HOOKED], ids=["facts", "exception", "its own excepthook"])
@pytest.mark.parametrize("name", ["package.train", "package"])
def test_run_does_what_python_does_with_a_module(name: str, source: str, tmp_path: Path) -> None:
    write(tmp_path / "package" / "__init__.py", "")
    write(tmp_path / "package" / "train.py", source)
    write(tmp_path / "package" / "__main__.py", source)
    plain = python("-m", name, "--lr", "0.1", folder=tmp_path)
    ours = python("-m", "fastclip", "run", "-m", name, "--lr", "0.1", folder=tmp_path)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    # All except Python's own frames, which come before the module's.
    assert ours.stderr.splitlines()[-3:] == plain.stderr.splitlines()[-3:]
    assert "fastclip" not in ours.stderr
    assert "runpy" not in ours.stderr


def test_run_finds_the_folder_of_a_script_behind_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real" / "train.py", "import sys\nprint(sys.path[0], __file__, sys.argv)")
    (tmp_path / "link.py").symlink_to(tmp_path / "real" / "train.py")
    plain = python("link.py", folder=tmp_path)
    assert python("-m", "fastclip", "run", "link.py", folder=tmp_path).stdout == plain.stdout
    assert str(tmp_path / "real") in plain.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no option -P")
def test_run_leaves_sys_path_alone_where_python_puts_no_folder_there(tmp_path: Path) -> None:
    write(tmp_path / "train.py", "import sys\nprint(sys.path)")
    plain = python("-P", "train.py", folder=tmp_path)
    assert python("-P", "-m", "fastclip", "run", "train.py", folder=tmp_path).stdout == plain.stdout


NOTHING_TO_RUN = [
    (["missing.py"], "cannot open the script 'missing.py': No such file or directory"),
    (["."], "cannot open the script '.': Is a directory"),
    (["-m", "missing"], "there is no module 'missing' that can be run"),
    (["-m", "package.missing.deeper"], "there is no module 'package.missing.deeper' that can be run"),
    (["-m", "package"], "there is no module 'package' that can be run"),
    (["-m", "sys"], "there is no module 'sys' that can be run"),
    (["-m", "__main__"], "there is no module '__main__' that can be run"),
    ([], "the following arguments are required: script"),
    (["--verbos=3", "train.py"], "error"),
]


@pytest.mark.parametrize(("arguments", "message"), NOTHING_TO_RUN)
def test_run_with_nothing_to_run_says_so_and_exits_with_2(
    arguments: Sequence[str], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "package" / "__init__.py", "")
    result = python("-m", "fastclip", "run", *arguments, folder=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_package_that_fails_to_import_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    write(tmp_path / "package" / "__init__.py", "import no_such_module_anywhere")
    result = python("-m", "fastclip", "run", "-m", "package.train", folder=tmp_path)
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in result.stderr


TRAINING = """
    import importlib.util, os, sys
    assert importlib.util.find_spec("torch") and "torch" not in sys.modules
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from torch.nn.utils import clip_grad_norm_
    import fastclip

    assert torch.get_num_threads() == 1
    model = torch.nn.Linear(3, 1)
    for step in range(4):
        model(torch.ones(2, 3)).sum().backward()
        clip_grad_norm_(model.parameters(), 1.0)
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.25)
    print(max(p.grad.abs().max().item() for p in model.parameters()))
    if "-v" not in sys.orig_argv:
        assert clip_grad_norm_ is fastclip.clip_grad_norm_
        assert torch.nn.utils.clip_grad.clip_grad_norm_ is fastclip.clip_grad_norm_
    assert not any(type(finder).__module__.startswith("fastclip") for finder in sys.meta_path)
"""


def test_run_patches_torch_before_the_script_can_bind_its_functions(tmp_path: Path) -> None:
    write(tmp_path / "train.py", TRAINING)
    result = python("-m", "fastclip", "run", "train.py", folder=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0.25\n", "")


def test_run_verbose_says_how_many_calls_went_through_fastclip(tmp_path: Path) -> None:
    write(tmp_path / "train.py", TRAINING)
    result = python("-m", "fastclip", "run", "-v", "train.py", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "0.25\n")
    assert result.stderr.startswith("fastclip[")
    assert result.stderr.endswith(
        "]: calls of torch's clipping functions that went through fastclip: clip_grad_norm_ 4, clip_grad_value_ 1\n"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch", "calls of torch's clipping functions that went through fastclip: none"),
        ("print('no torch')", "the script did not import torch"),
    ],
)
def test_run_verbose_says_when_nothing_went_through(source: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "train.py", source)
    result = python("-m", "fastclip", "run", "--verbose", "train.py", folder=tmp_path)
    assert result.stderr.endswith(f"]: {message}\n")


def test_run_patches_at_once_where_torch_is_imported_already(tmp_path: Path) -> None:
    source = "import torch, fastclip\nassert torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_"
    write(tmp_path / "train.py", source)
    code = "import torch; from fastclip.switching import running; running.run('train.py', [])"
    result = python("-c", code, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


PROCESSES = """
    import sys
    import torch
    import torch.multiprocessing as mp
    from torch.utils.data import DataLoader, Dataset

    class Numbers(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return Sample(index)

    class Sample:
        def __init__(self, value):
            self.value = value

    def collate(samples):
        import fastclip
        ours = torch.nn.utils.clip_grad_norm_.__wrapped__ is fastclip.clip_grad_norm_
        return ours, sum(sample.value for sample in samples)

    def clip(rank):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.ones(2)
        for _ in range(rank + 1):
            torch.nn.utils.clip_grad_norm_([p], 1.0)

    if __name__ == "__main__":
        clip(0)
        method = sys.argv[1]
        loader = DataLoader(Numbers(), batch_size=2, num_workers=1, collate_fn=collate, multiprocessing_context=method)
        print(list(loader))
        mp.start_processes(clip, nprocs=2, start_method=method)
"""


@pytest.mark.parametrize(
    ("method", "target"),
    [("spawn", ["train.py"]), ("spawn", ["-m", "train"]), ("fork", ["train.py"]), ("forkserver", ["train.py"])],
)
def test_run_reaches_the_processes_that_multiprocessing_starts(method: str, target: list[str], tmp_path: Path) -> None:
    write(tmp_path / "train.py", PROCESSES)
    result = python("-m", "fastclip", "run", "-v", *target, method, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "[(True, 1), (True, 5)]\n"), result.stderr
    reports = sorted(line.rpartition(": ")[2] for line in result.stderr.splitlines())
    # The first process and the two that train; the worker of the DataLoader called nothing, and reports nothing.
    assert reports == ["clip_grad_norm_ 1", "clip_grad_norm_ 1", "clip_grad_norm_ 2"], result.stderr


NORMS = """
    import sys
    import torch
    import torch.multiprocessing as mp

    def clip(rank):
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        p.grad = torch.ones(3, dtype=torch.bfloat16)
        print(torch.nn.utils.clip_grad_norm_([p], 10.0).dtype, *sys.argv[1:], flush=True)

    if __name__ == "__main__":
        clip(0)
        mp.start_processes(clip, nprocs=1, start_method="spawn")
"""


@pytest.mark.parametrize("options", [["--norm-dtype", "float32"], ["-v", "--norm-dtype=float32", "-m"]], ids=str)
def test_run_with_a_dtype_for_norms(options: list[str], tmp_path: Path) -> None:
    """Also in the processes that the script starts."""
    write(tmp_path / "train.py", NORMS)
    target = "train" if "-m" in options else "train.py"
    result = python("-m", "fastclip", "run", *options, target, "--norm-dtype", "mine", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "torch.float32 --norm-dtype mine\n" * 2), result.stderr


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_run_works_under_torchrun(tmp_path: Path) -> None:
    source = """
        import os, sys, torch
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.ones(2)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        with open(os.environ["RANK"] + ".txt", "w") as file:
            print(*sys.argv, file=file)
    """
    write(tmp_path / "train.py", source)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = python(*torchrun, "-m", "fastclip", "run", "-v", "train.py", "--lr", "0.1", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["train.py --lr 0.1\n"] * 2
    assert result.stderr.count("functions that went through fastclip: clip_grad_norm_ 1\n") == 2


def test_the_command_hands_check_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []

    def main(argv: list[str]) -> int:
        received.append(argv)
        return 7

    check = types.ModuleType("fastclip.switching.check")
    vars(check)["main"] = main
    monkeypatch.setitem(sys.modules, "fastclip.switching.check", check)
    monkeypatch.setattr(switching, "check", check, raising=False)
    assert command.main(["check", "-h", "--device", "cpu"]) == 7
    assert received == [["-h", "--device", "cpu"]]


def test_the_command_prints_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastclip, "info", lambda: "device: cpu\nbackend: numpy", raising=False)
    assert command.main(["info"]) == 0
    assert capsys.readouterr().out == "device: cpu\nbackend: numpy\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["run", "check", "info"]),
        (
            ["run", "--help"],
            ["(script | -m module)", "--verbose", "--norm-dtype", "torchrun", "accelerate launch", "subprocess"],
        ),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


def test_an_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["train.py"])
    assert stop.value.code == 2
    assert "run" in capsys.readouterr().err
