"""Popular trainers, with fastclip switched on and off: the same losses, and proof that fastclip was called.

They need the extras `trainers` and `timm`, and no network: models are tiny, with random weights from a configuration. A
test whose package is not installed is skipped. `.ci/run` runs them in separate environments.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad

import fastclip
from fastclip.switching import patching

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")  # read when the packages are imported

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the packages themselves
    pytest.mark.filterwarnings("error:.*fastclip"),
]

STEPS = 4
NORM, VALUE = 0.05, 0.001  # so small that every step is clipped


@contextlib.contextmanager
def switched_on() -> Iterator[list[str]]:
    """Patch as `fastclip.patch()` does; yield the list to which the name of each called function is added."""
    calls: list[str] = []
    patching.patch_counting(calls.append)
    try:
        yield calls
    finally:
        fastclip.unpatch()


def compare(train: Callable[[bool], list[float]], function: str, calls: int = STEPS) -> None:
    """Train without clipping, with torch's, and with fastclip's; check that each step calls fastclip."""
    without, theirs = train(False), train(True)
    with switched_on() as seen:
        ours = train(True)
    assert seen == [function] * calls
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)  # the sums of norms have another order
    assert ours != pytest.approx(without, rel=1e-3)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(STEPS)]


def step(
    net: nn.Module,
    optimizer: Any,
    batch: tuple[Tensor, Tensor],
    *,
    backward: Callable[[Tensor], object] = Tensor.backward,
    clip: Callable[[], object] = lambda: None,
) -> float:
    """Do a step of a plain loop; return its loss."""
    optimizer.zero_grad()
    loss = functional.mse_loss(net(batch[0]), batch[1])
    backward(loss)
    clip()
    optimizer.step()
    return loss.item()


# ---- Plain loops, with the usual ways of calling


CALLS: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "nanoGPT": ("clip_grad_norm_", lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), NORM)),
    "MMEngine": ("clip_grad_norm_", lambda net: clip_grad.clip_grad_norm_(net.parameters(), max_norm=NORM)),
    "by value": ("clip_grad_value_", lambda net: torch.nn.utils.clip_grad_value_(net.parameters(), VALUE)),
}


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "GradScaler"])
@pytest.mark.parametrize("call", CALLS)
def test_plain_loop(call: str, amp: bool) -> None:
    """As in nanoGPT, there is always a scaler, which may be disabled."""
    function, clip = CALLS[call]

    def train(clips: bool) -> list[float]:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=amp)
        losses = []
        for x, y in batches():
            loss = functional.mse_loss(net(x), y)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if clips:
                scaler.unscale_(optimizer)
                clip(net)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    compare(train, function)


# ---- Trainers


@pytest.mark.parametrize("by", ["norm", "value"])
def test_accelerate(by: str) -> None:
    accelerate = pytest.importorskip("accelerate")

    def train(clips: bool) -> list[float]:
        accelerator = accelerate.Accelerator(cpu=True)
        net = model()
        net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.5))

        def clip() -> None:
            if clips and by == "norm":
                accelerator.clip_grad_norm_(net.parameters(), NORM)
            elif clips:
                accelerator.clip_grad_value_(net.parameters(), VALUE)

        return [step(net, optimizer, batch, backward=accelerator.backward, clip=clip) for batch in batches()]

    compare(train, f"clip_grad_{by}_")


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokens = torch.randint(64, (STEPS * 2, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    norms: list[list[float]] = []

    def train(clips: bool) -> list[float]:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_grad_norm=NORM if clips else 0.0,
            optim="sgd",
            learning_rate=5.0,
            per_device_train_batch_size=2,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(transformers.GPT2LMHeadModel(config), arguments, train_dataset=data)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        if clips:
            norms.append([entry["grad_norm"] for entry in entries])
        return [entry["loss"] for entry in entries]

    compare(train, "clip_grad_norm_")
    theirs, ours = norms
    assert ours == pytest.approx(theirs, rel=1e-4)  # the logged norms


@pytest.mark.parametrize("by", ["norm", "value"])
def test_lightning(by: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]  # a package that may not be there
        def __init__(self) -> None:
            super().__init__()
            self.net = model()
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss = functional.mse_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def train(clips: bool) -> list[float]:
        clipping = {"gradient_clip_val": NORM if by == "norm" else VALUE, "gradient_clip_algorithm": by}
        trainer = lightning.Trainer(
            **(clipping if clips else {}),
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
        losses: list[float] = module.losses
        return losses

    compare(train, f"clip_grad_{by}_")


@pytest.mark.parametrize("by", ["norm", "value"])
def test_fabric(by: str) -> None:
    lightning = pytest.importorskip("lightning")

    def train(clips: bool) -> list[float]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        net = model()
        net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        limit = {"max_norm": NORM} if by == "norm" else {"clip_val": VALUE}

        def clip() -> None:
            if clips:
                fabric.clip_gradients(net, optimizer, **limit)

        return [step(net, optimizer, batch, backward=fabric.backward, clip=clip) for batch in batches()]

    compare(train, f"clip_grad_{by}_")


@pytest.mark.parametrize("by", ["norm", "value"])
def test_mmengine(by: str) -> None:
    optim = pytest.importorskip("mmengine.optim")

    def train(clips: bool) -> list[float]:
        net = model()
        clipping = {"type": by, **({"max_norm": NORM} if by == "norm" else {"clip_value": VALUE})}
        # It looks torch's function up here: a later patch does not reach it.
        wrapper = optim.OptimWrapper(torch.optim.SGD(net.parameters(), lr=0.5), clip_grad=clipping if clips else None)
        losses = []
        for x, y in batches():
            loss = functional.mse_loss(net(x), y)
            wrapper.update_params(loss)
            losses.append(loss.item())
        return losses

    compare(train, f"clip_grad_{by}_")


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_timm(mode: str) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)  # also if its torchvision does not fit this torch

    def train(clips: bool) -> list[float]:
        torch.manual_seed(0)
        net = timm.create_model("test_vit", pretrained=False, num_classes=1, img_size=32)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        limit = VALUE if mode == "value" else NORM

        def clip() -> None:
            if clips:
                timm.utils.dispatch_clip_grad(net.parameters(), limit, mode=mode)

        generator = torch.Generator().manual_seed(1)
        images = [(torch.randn(2, 3, 32, 32, generator=generator), torch.ones(2, 1)) for _ in range(STEPS)]
        return [step(net, optimizer, batch, clip=clip) for batch in images]

    # Adaptive clipping is timm's own code, which a patch does not change.
    compare(train, f"clip_grad_{mode}_", calls=0 if mode == "agc" else STEPS)


# ---- Unchanged scripts under a launcher


SCRIPT = """
import atexit
import os
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_  # bound at import, which a later patch() would not reach

def train(max_norm, rank):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        x, y = torch.randn(4, 8, generator=generator), torch.randn(4, 1, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with open(f"{sys.argv[1]}-{max_norm}-{rank}.txt", "a") as file:
            print(loss.item(), file=file)

torch.distributed.init_process_group("gloo")
for max_norm in map(float, sys.argv[2:]):
    train(max_norm, torch.distributed.get_rank())
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# What is left of gloo's threads is cut off at the interpreter's exit, now and then, and the process aborts.
atexit._run_exitfuncs()
os._exit(0)
"""

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate launch": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, tmp_path: Path) -> None:
    """Two processes of a script that imports torch's function by name."""
    if launcher == "accelerate launch" and find_spec("accelerate") is None:
        pytest.skip("could not import 'accelerate'")
    (tmp_path / "train.py").write_text(SCRIPT)

    def launch(*command: str) -> str:
        result = subprocess.run(
            [sys.executable, *LAUNCHERS[launcher], *command, str(NORM), "inf"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stderr

    def losses(name: str, max_norm: float = NORM) -> list[float]:
        files = [tmp_path / f"{name}-{max_norm}-{rank}.txt" for rank in range(2)]
        return [float(loss) for file in files for loss in file.read_text().split()]

    launch("train.py", "theirs")
    said = launch("-m", "fastclip", "run", "-v", "train.py", "ours")
    assert said.count(f"functions that went through fastclip: clip_grad_norm_ {2 * STEPS}\n") == 2
    assert losses("ours") == pytest.approx(losses("theirs"), rel=1e-5)
    assert losses("ours") != pytest.approx(losses("ours", float("inf")), rel=1e-3)
