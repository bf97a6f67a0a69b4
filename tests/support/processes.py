"""Processes that are started once, form a process group (gloo, on this machine), and run one function after another."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

_START_LIMIT = 180  # seconds: each process imports torch, perhaps on few cores
_CALL_LIMIT = 120  # seconds in which a function must return on all ranks; a collective that hangs raises sooner
_COLLECTIVE_LIMIT = timedelta(seconds=40)


TORCH_CANNOT = {
    "2.11": (
        "Attempted to flatten multiple dimensions",  # a linear layer under tensor parallelism
        "is unable to be interpreted into a corresponding shard_order",  # full_tensor() of such a shard
    ),
}
"""By version of torch: its own error messages for a test's DTensors that later versions accept."""


class Pool:
    """A process for each rank of a world.

    Args:
        size: The number of processes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of an importable module on every rank, and return the results by rank.

        Raises:
            AssertionError: The function raised on a rank, or did not return in time; the message has the tracebacks.
        """
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, arguments))
        answers = self._answers(_CALL_LIMIT)
        failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if failures:
            self.end()  # the other ranks may wait in a collective, or be past it
            version = ".".join(torch.__version__.split(".")[:2])
            for refusal in TORCH_CANNOT.get(version, ()):
                if all(refusal in failure for failure in failures):
                    pytest.skip(f"torch {version} refuses it itself: {refusal}")
            raise AssertionError("\n".join([f"{function.__name__}{arguments} failed", *failures]))
        return [result for _, result in answers]

    def _start(self) -> None:
        context = get_context("spawn")
        store = Path(self.folder.name) / f"store{len(os.listdir(self.folder.name))}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        assert self._answers(_START_LIMIT) == [(None, None)] * self.size

    def _answers(self, limit: float) -> list[tuple[str | None, Any]]:
        answers: dict[int, tuple[str | None, Any]] = {}
        while len(answers) < self.size:
            waiting = {connection: rank for rank, connection in enumerate(self.connections) if rank not in answers}
            ready = wait(list(waiting), timeout=limit)
            if not ready:
                answers |= dict.fromkeys(waiting.values(), (f"no answer within {limit} s", None))
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    answers[waiting[connection]] = connection.recv()
                except EOFError:
                    answers[waiting[connection]] = ("its process ended", None)
        return [answers[rank] for rank in range(self.size)]

    def end(self) -> None:
        """End the processes; kill those that wait in a collective. The next `run` starts new ones."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []

    def close(self) -> None:
        """End the processes for good."""
        self.end()
        self.folder.cleanup()


def join(store: str, rank: int, size: int) -> None:
    """Form a process group with all processes that call this with the same file, which does not exist yet."""
    import torch.distributed as dist

    rendezvous = dist.FileStore(store, size)  # type: ignore[attr-defined]  # which torch does not list
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=size, timeout=_COLLECTIVE_LIMIT)


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """Be a rank: call each function that arrives, and send its result or its traceback."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    join(store, rank, size)
    connection.send((None, None))
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            break
        function, arguments = request
        answer: tuple[str | None, Any]
        try:
            answer = (None, function(*arguments))
        except BaseException:  # noqa: BLE001 - the test gets every kind
            answer = (traceback.format_exc(), None)
        connection.send(answer)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
